"""The figures of docs/measured.md are taken from where the benchmarks put them."""

import pytest

from bench.suite import extract


def figures(found):
    return {(f.workload, f.what): (f.baseline, f.ours) for f in found}


def test_serving_has_stock_beside_ours():
    ttft = {"mean": 2.0, "p50": 1.0, "p99": 3.0}
    row = {"ttft_s": ttft, "tokens_per_s": 9.0, "hit_share": {"device": 0.1}, "of_infinite": 0.2}
    chats = {"title": "chats", "subjects": {"stock": row, "smg": row | {"of_infinite": 1.0}}}
    prefix = {"stock": {"cold": {"p50": 4.0}}, "smg": {"cold": {"p50": 5.0}, "host": {"p50": 0.2}}}
    middle = {"tokens_per_s": {"p50": 3.0}, "itl_s": {"p50": 0.05}}
    ratio = {"tokens_per_s": {"ratio": 1.01}, "itl_s": {"ratio": 0.99}}
    no_reuse = {"subjects": {"stock": middle, "smg": middle}, "ratios": {"smg": ratio}}
    phases = {"chats": chats, "prefix": {"subjects": prefix}, "no_reuse": no_reuse}
    found = figures(extract.serving({"phases": phases}))
    assert found["chats", "hits, of an infinite cache's"] == (0.2, 1.0)
    assert found["a 2,000-token prefix", "TTFT p50, in host memory"] == (None, 0.2)
    assert found["prompts that share nothing", "inter-token latency"] == (50.0, 50.0)


def test_programs_tell_time_hits_and_differing_outputs():
    row = {"seconds": {"p50": 2.0}, "device": {"p50": 0.5}, "host": {"p50": 0.0}}
    program = {
        "subjects": {"stock": row, "smg": row},
        "stock_against_itself": {"different": 1},
        "ours_against_stock": {"different": 2},
    }
    result = {"programs": {"tree_of_thought": program}, "options": {"dtype": "float32"}}
    found = figures(extract.programs(result))
    title = "frontend program: tree of thought (float32)"
    assert found[title, "time"] == (2.0, 2.0)
    assert found[title, "outputs unlike stock's first run"] == (1, 2)


def test_the_parts_have_their_own_baselines():
    times = {"torch_native": [1, 20.0, 3], "smg": [1, 2.0, 3]}
    case = {"kind": "cached prefix", "batch": 1, "layers": 4, "dtype": "x", "new": 16}
    (attention,) = extract.attention({"results": [case | {"cached": 2700, "ms": times}]})
    assert (attention.baseline, attention.ours) == (20.0, 2.0)
    rows = [
        {"size": 16, "operation": "evict 4,000", "subject": name, "median_us": us}
        for name, us in (("RadixTree", 1.0), ("SGLang Rust core", 4.0))
    ]
    (tree,) = extract.tree({"prompts": rows, "options": {"pages": 10}})
    assert (tree.baseline, tree.ours) == (4.0, 1.0)
    rates = {"plain memcpy": [10.0, 12.0], "load, compiled": [8.0], "load, torch": [1.0]}
    moved = {"shape": "s", "order": "random", "gb_per_s": rates}
    (load,) = extract.transfer({"results": [moved, moved | {"order": "in order"}]})
    assert (load.what, load.baseline, load.ours) == ("load", 11.0, 8.0)
    (call,) = extract.memory({"rows": {"call: ping": {"p50_us": 7.0}, "books: x": {"p50_us": 1}}})
    assert (call.what, call.baseline, call.ours) == ("ping", None, 7.0)


def test_a_split_is_held_against_one_worker():
    one = {"itl_p50_ms": 1, "itl_p99_ms": 9, "itl_max_ms": 10, "ttft_p50_s": 2}
    split = {name: value / 2 for name, value in one.items()}
    found = extract.split({"figures": {"one worker": one, "split": split}})
    assert [(f.what, f.baseline, f.ours) for f in found][1] == ("ITL p99", 9, 4.5)


def test_streamed_contexts_are_held_against_a_pool_that_holds_them():
    kinds = {"prefill": {"p50": 100.0}, "decode": {"p50": 10.0}}
    result = {
        "options": {"tokens": 8000, "share": 4},
        "spread": {"all in the pool": kinds, "streamed": kinds},
        "streamed_over_pool": {"prefill": {"ratio": 0.9}, "decode": {"ratio": 0.8}},
    }
    found = [(f.unit, f.baseline, f.ours) for f in extract.context(result)]
    assert found == [("tok/s", 100, 100), ("x", 1, 0.9), ("tok/s", 10, 10), ("x", 1, 0.8)]


def test_a_benchmark_may_bring_its_own_figures():
    row = {"workload": "w", "what": "x", "unit": "s", "baseline": None, "ours": 1.0}
    (figure,) = extract.own_figures({"figures": [row]})
    assert figure.ours == 1.0
    with pytest.raises(KeyError):
        list(extract.own_figures({}))
