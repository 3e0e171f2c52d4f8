"""Costs of models, from what they are made of."""

import json

import pytest

from smg_sglang.errors import ConfigError
from smg_sglang.simulate.model import MODELS, model_cost


@pytest.mark.parametrize(
    ("name", "kv_bytes", "parameters"),
    [
        ("llama-3.1-8b", 131_072, 6.98e9),
        ("qwen2.5-7b", 57_344, 6.53e9),
        ("smollm2-135m", 23_040, 106e6),
    ],
)
def test_the_known_models_have_their_published_sizes(name, kv_bytes, parameters):
    cost = model_cost(name)
    assert cost.kv_bytes == kv_bytes
    # Two FLOPs a parameter, embeddings left out.
    assert cost.linear_flops == pytest.approx(2 * parameters, rel=0.01)


def test_a_model_is_read_from_its_folder(demo_model):
    cost = model_cost(str(demo_model))
    known = model_cost("smollm2-135m")
    assert (cost.kv_bytes, cost.linear_flops) == (known.kv_bytes, known.linear_flops)
    assert model_cost(str(demo_model / "config.json")).kv_bytes == known.kv_bytes


def test_prefill_adds_up_and_grows_with_depth():
    cost = model_cost("llama-3.1-8b")
    whole = cost.prefill_flops(0, 4096)
    assert whole == pytest.approx(cost.prefill_flops(0, 1000) + cost.prefill_flops(1000, 4096))
    assert cost.prefill_flops(3000, 4000) > cost.prefill_flops(0, 1000)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kv_lora_rank": 512}, "no MLA"),
        ({"num_local_experts": 8}, "no MLA or MoE"),
        ({"torch_dtype": "int3"}, "dtype 'int3'"),
        ({"hidden_size": "x"}, "does not describe a model known"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path, change, says):
    config = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConfigError, match=says):
        model_cost(str(tmp_path))


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=", ".join(MODELS)):
        model_cost("gpt-5")
