"""The command, from a trace on disk to figures on disk."""

import csv
import json

import pytest

from smg_sglang.__main__ import main
from smg_sglang.config import EvictionName

from ..trace.factories import call, mooncake, session, write_lines, write_tar

MODEL = ("--model", "smollm2-135m")


@pytest.fixture
def trace(tmp_path):
    """Two chats in turns; each turn goes on where the last one ended."""
    rows, ids = [], {"a": [], "b": []}
    for turn in range(8):
        chat = "ab"[turn % 2]
        ids[chat].append(100 * (1 + turn % 2) + turn)
        rows.append(mooncake(1000 * turn, 512 * len(ids[chat]), 20, ids[chat]))
    return write_lines(tmp_path / "trace.jsonl.gz", *rows)


def simulate(*arguments) -> int:
    return main(["simulate", *map(str, arguments)])


def test_a_run_is_printed_and_written(trace, tmp_path, capsys):
    path = tmp_path / "run.json"
    options = ("--device-tokens", 3072, "--host-gb", 1, "--json", path)
    assert simulate(trace, *MODEL, *options) == 0
    told = capsys.readouterr().out
    assert "hits, host" in told and "TTFT saved" in told
    run = json.loads(path.read_text())
    assert run["requests"] == 8
    assert run["input_tokens"] == 512 * (1 + 1 + 2 + 2 + 3 + 3 + 4 + 4)
    assert run["hit_tokens"].keys() == {"device", "host", "storage"}
    assert run["hit_tokens"]["host"] > 0
    assert sum(run["hit_tokens"].values()) == run["input_tokens"] - 8 * 512
    assert run["assumed"] == {"tflops": 0.14, "link_gbps": 12.0, "itl_ms": 60.0}


def test_a_sweep_is_written_as_csv_and_png_between_its_bounds(trace, tmp_path, capsys):
    out, path = tmp_path / "out", tmp_path / "sweep.json"
    options = ("--device-tokens", 3072, "--sweep", "--policy", "lru,cost", "--out", out)
    assert simulate(trace, *MODEL, *options, "--json", path) == 0
    assert "optimum" in capsys.readouterr().out
    assert (out / "trace_sweep.png").read_bytes().startswith(b"\x89PNG")
    with (out / "trace_sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["policy"] for row in rows] == ["lru"] * 8 + ["cost"] * 8
    for row in rows:
        assert float(row["total_share"]) <= float(row["belady_share"]) + 1e-9
        assert float(row["belady_share"]) <= float(row["infinite_share"]) + 1e-9
    assert float(rows[0]["host_share"]) == 0 < float(rows[7]["host_share"])
    assert len(json.loads(path.read_text())["runs"]) == 16


def test_single_levels_count_references_to_blocks(trace, tmp_path, capsys):
    path = tmp_path / "blocks.json"
    assert simulate(trace, "--blocks", "4,100", "--policy", "all", "--json", path) == 0
    assert "flat lru" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found["block_references"] == 20
    assert found["infinite"] == 12 / 20
    assert found["shares"]["100"] == dict.fromkeys(["flat lru", *EvictionName, "optimum"], 12 / 20)


def test_agent_sessions_are_simulated_too(tmp_path):
    path = write_tar(tmp_path / "s.tgz", a=session("a", call(0.0, 128), call(5.0, 192, [1, 2, 3])))
    assert simulate(path, *MODEL, "--device-tokens", 1024, "--closed") == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "--device-tokens is needed"),
        (("--device-tokens", 3072, "--policy", "mru"), "--policy must be some of lru, "),
        (("--device-tokens", 3072, "--model", "gpt-5"), "--model must be one of"),
        (("--device-tokens", 3072, "--page-size", 0), "--page-size must be above 0"),
        (("--device-tokens", 3072, "--host-gb", -1), "must not be negative"),
        (("--device-tokens", 3072, "--tflops", "nan"), "--tflops must be above 0"),
        (("--device-tokens", 16), "two pages at least"),
    ],
)
def test_a_wrong_choice_ends_with_one_sentence_and_code_2(trace, capsys, options, says):
    assert simulate(trace, *options) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert says in told


def test_a_bad_trace_ends_with_its_line_and_code_2(tmp_path, capsys):
    path = write_lines(tmp_path / "t.jsonl", mooncake(9), mooncake(8))
    assert simulate(path, "--device-tokens", 3072) == 2
    assert capsys.readouterr().err.startswith(
        f"smg_sglang simulate: {path}, line 2: time goes backwards"
    )


def test_a_trace_that_holds_nothing_that_fits_is_told(trace, capsys):
    assert simulate(trace, *MODEL, "--device-tokens", 256) == 0
    assert "refused" in capsys.readouterr().out
