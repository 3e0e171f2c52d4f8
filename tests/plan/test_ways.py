"""The arithmetic of `smg_sglang plan`: its limits, and what others here say of the same."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smg_sglang.plan.cli import DEFAULT, main, plan
from smg_sglang.plan.shape import LATENT, decode_shape
from smg_sglang.plan.ways import (
    GB,
    best_share,
    cpu_worker,
    dollars_a_million,
    hops_s,
    host_attention_gbps,
    kwh_a_million,
    ways,
    weights_s,
)
from smg_sglang.simulate.model import MODELS, model_cost

LLAMA = decode_shape("llama-3.1-8b")
RATES = st.floats(1, 5000)
BOXES = st.builds(
    lambda link, attention, dram, device: replace(
        DEFAULT, link_gbps=link, attention_gbps=attention, dram_gbps=dram, device_gbps=device
    ),
    *[RATES] * 4,
)
SHAPES = st.sampled_from([*map(decode_shape, MODELS), *LATENT.values()])
CONTEXTS = st.integers(1, 1 << 20)


def by_name(shape, box, context, batch=1):
    return {way.name: way.step_s for way in ways(shape, replace(box, host_gib=1e6, device_gib=1e6),
                                                 context, batch)}  # fmt: skip


@given(SHAPES, BOXES, CONTEXTS)
def test_both_is_never_slower_than_either(shape, box, context):
    step = by_name(shape, box, context)
    assert step["both"] <= min(step["streamed"], step["host attention"])
    assert step["both"] >= weights_s(shape, box)


@given(SHAPES, BOXES, CONTEXTS)
def test_no_split_is_better_than_the_best(shape, box, context):
    kv = context * shape.kv_bytes
    rate, link = host_attention_gbps(shape, box) * GB, box.link_gbps * GB
    alone = weights_s(shape, box) + hops_s(shape, box)

    def time(share):
        return max(alone + share * kv / rate, (1 - share) * kv / link)

    best = time(best_share(shape, box, kv))
    assert all(best <= time(share / 50) * (1 + 1e-9) for share in range(51))


@given(SHAPES, BOXES, st.integers(1, 1 << 18), st.sampled_from(["link_gbps", "attention_gbps"]))
def test_what_is_faster_or_shorter_takes_no_longer(shape, box, context, rate):
    faster = replace(box, **{rate: 2 * getattr(box, rate)})
    before, after = by_name(shape, box, context), by_name(shape, faster, context)
    shorter = by_name(shape, box, max(1, context // 2))
    for name in before:
        assert after[name] <= before[name]
        assert shorter[name] <= before[name]


def test_a_token_of_llama_at_128k():
    """By hand: 128 KiB a token, 17.2 GB of context, 15 GB of weights read a step."""
    assert LLAMA.kv_bytes == 131072
    assert LLAMA.weight_bytes == pytest.approx(15.0e9, rel=0.01)
    step = by_name(LLAMA, DEFAULT, 131072)
    assert step["device"] == pytest.approx((15.0e9 + 17.18e9) / 3350e9, rel=0.01)
    assert step["streamed"] == pytest.approx(17.18 / 44, rel=0.01)
    assert step["host attention"] == pytest.approx(0.00448 + 32 * 20e-6 + 17.18 / 210, rel=0.01)
    assert step["both"] == pytest.approx(0.0719, rel=0.01)


def test_kv_and_flops_are_the_simulators():
    for name in MODELS:
        cost, shape = model_cost(name), decode_shape(name)
        assert shape.kv_bytes == cost.kv_bytes
        assert shape.attention_flops == cost.attention_flops
        # One more token of a prompt, computed alone: linear products and attention over the rest.
        more = cost.prefill_flops(1000, 1001)
        assert more == pytest.approx(cost.linear_flops + 1000 * shape.attention_flops, rel=1e-3)


def test_latents_are_bound_by_arithmetic():
    """128 heads read one latent: 242 FLOPs a byte."""
    deepseek = LATENT["deepseek-v3"]
    assert host_attention_gbps(deepseek, DEFAULT) == pytest.approx(1500 / 241.8, rel=0.01)
    assert host_attention_gbps(LLAMA, DEFAULT) == DEFAULT.attention_gbps
    step = by_name(deepseek, DEFAULT, 131072)
    assert step["streamed"] < step["host attention"]


def test_what_fits():
    rows = {way.name: way for way in ways(LLAMA, DEFAULT, 131072, 1)}
    assert rows["device"].fits == 3
    assert rows["streamed"].fits == 32
    assert {way.name: way.step_s for way in ways(LLAMA, DEFAULT, 131072, 10)}["device"] is None
    assert max(way.fits for way in rows.values()) == 32
    assert cpu_worker(LLAMA, DEFAULT, 131072, 1).fits == 31
    assert cpu_worker(LLAMA, DEFAULT, 131072, 40).step_s is None


def test_prices():
    assert dollars_a_million(0.1, 10, 3.6) == pytest.approx(10.0)
    assert kwh_a_million(0.1, 10, 1000) == pytest.approx(1000 * 1e4 / 3.6e6)


def test_the_command(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert main(["--model", "llama-3.1-8b", "--link-gbps", "50", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["box"]["link_gbps"] == 50
    assert report == plan("llama-3.1-8b", replace(DEFAULT, link_gbps=50), 131072, 1, 1.0)
    assert "cheapest a token" in capsys.readouterr().out


def test_a_folder_of_a_model(tmp_path, capsys):
    config = {
        "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
        "num_hidden_layers": 30, "num_key_value_heads": 3, "torch_dtype": "bfloat16",
        "vocab_size": 49152,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape, known = decode_shape(str(tmp_path)), decode_shape("smollm2-135m")
    assert replace(shape, name="") == replace(known, name="")
    assert main(["--model", str(tmp_path), "--context", "1000"]) == 0


@pytest.mark.parametrize(
    ("model", "says"),
    [("gpt-5", "--model must be one of llama-3.1-8b"), ("/dev/null", "does not describe a model")],
)
def test_what_is_not_known_is_one_sentence(model, says, capsys):
    assert main(["--model", model]) == 2
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1
