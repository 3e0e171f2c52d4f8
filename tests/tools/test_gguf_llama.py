from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from tools import gguf_llama

HIDDEN, HEADS, KV_HEADS, FFN = 32, 4, 2, 64


def llama_cpp_permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """As in llama.cpp's convert_hf_to_gguf.py."""
    rows = weight.shape[0]
    return (
        weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


@pytest.mark.parametrize(("heads", "head_dim"), [(9, 64), (3, 64), (1, 2), (4, 6)])
def test_undoing_the_rope_permutation_restores_the_rows(heads, head_dim):
    weight = np.random.default_rng(0).standard_normal((heads * head_dim, 5), dtype=np.float32)
    permuted = llama_cpp_permute(weight, heads)
    assert np.array_equal(gguf_llama.undo_rope_permutation(permuted, heads), weight)


def test_tensor_names_become_those_of_transformers():
    name = gguf_llama.transformers_name
    assert name("token_embd.weight") == "model.embed_tokens.weight"
    assert name("blk.12.attn_k.weight") == "model.layers.12.self_attn.k_proj.weight"
    assert name("blk.0.ffn_down.weight") == "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize("unknown", ["rope_freqs.weight", "blk.0.ssm_a.weight", "weight"])
def test_a_tensor_that_no_llama_has_is_refused_by_name(unknown):
    with pytest.raises(ValueError, match=unknown):
        gguf_llama.transformers_name(unknown)


def write_gguf(path: Path, *, architecture: str = "llama", pre: str = "smollm") -> dict:
    """A one-layer Llama with a byte alphabet for a vocabulary; returns its tensors by GGUF name."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_alphabet(), "ab", "12"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages }}")
    tensors = random_tensors(len(tokens))
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def byte_alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def random_tensors(vocab: int) -> dict[str, np.ndarray]:
    shapes = {
        "token_embd": (vocab, HIDDEN),
        "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, FFN),
    }
    rng = np.random.default_rng(1)
    return {f"{k}.weight": rng.standard_normal(v, dtype=np.float32) for k, v in shapes.items()}


def test_conversion_writes_every_tensor_in_bf16(tmp_path):
    source = write_gguf(tmp_path / "model.gguf")
    gguf_llama.convert(tmp_path / "model.gguf", tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    key = gguf_llama.undo_rope_permutation(source["blk.0.attn_k.weight"], KV_HEADS)
    expected = {
        "model.embed_tokens.weight": source["token_embd.weight"],
        "model.layers.0.mlp.down_proj.weight": source["blk.0.ffn_down.weight"],
        "model.layers.0.self_attn.k_proj.weight": key,
    }
    assert len(written) == len(source)
    for name, value in expected.items():
        assert torch.equal(written[name], torch.from_numpy(value).bfloat16())


def test_conversion_keeps_digits_apart_and_merges_letters(tmp_path):
    write_gguf(tmp_path / "model.gguf")
    gguf_llama.convert(tmp_path / "model.gguf", tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("ab12").tokens == ["ab", "1", "2"]


@pytest.mark.parametrize("what", [{"architecture": "mamba"}, {"pre": "llama-bpe"}])
def test_another_kind_of_model_is_refused_and_named(tmp_path, what):
    write_gguf(tmp_path / "model.gguf", **what)
    with pytest.raises(ValueError, match=next(iter(what.values()))):
        gguf_llama.convert(tmp_path / "model.gguf", tmp_path)
