"""The command, from a trace on disk to figures on disk."""

import csv
import json
import sys

import pytest

from smg_sglang.__main__ import main
from smg_sglang.config import EvictionName
from smg_sglang.simulate.sweep import sweep_sizes

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
    assert run["assumed"] == {
        "tflops": 0.14,
        "link_gbps": 12.0,
        "itl_ms": 60.0,
        "storage_gbps": 1.0,
    }


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
        (("--device-tokens", 3072, "--page-size", 0), "--page-size: must be a whole number of at"),
        (
            ("--device-tokens", 3072, "--page-size", 24),
            "--page-size: must be a power of two from 1",
        ),
        (
            ("--device-tokens", 3072, "--page-size", 256),
            "--page-size: must be a power of two from 1",
        ),
        (("--device-tokens", 3072, "--host-gb", -1), "--host-gb: must be a number of at least 0"),
        (
            ("--device-tokens", 3072, "--host-gb", "inf"),
            "--host-gb: must be a number of at least 0",
        ),
        (("--device-tokens", 3072, "--host-gb", 1e300), "--host-gb: must be at most 1048576 GiB"),
        (("--device-tokens", 3072, "--tflops", "nan"), "--tflops: must be a number above 0"),
        (("--device-tokens", 3072, "--link-gbps", 0), "--link-gbps: must be a number above 0"),
        (("--device-tokens", 3072, "--itl-ms", -1), "--itl-ms: must be a number of at least 0"),
        (("--device-tokens", 3072, "--sweep=-1"), "--sweep: must be a number of at least 0"),
        (("--device-tokens", 3072, "--sweep=4,x"), "--sweep: must be a number of at least 0"),
        (("--device-tokens", 3072, "--scale-to", 0), "--scale-to: must be a whole number of at"),
        (("--device-tokens", 3072, "--block-tokens", 0), "--block-tokens: must be a whole number"),
        (("--device-tokens", 3072, "--limit", -1), "--limit: must be a whole number of at least 1"),
        (("--blocks", -3), "--blocks: must be a whole number of at least 1"),
        (("--blocks", 3, "--limit", 0), "--limit: must be a whole number of at least 1"),
        (("--blocks", 3, "--json", "/nowhere/at/all.json"), "there is no folder /nowhere/at"),
        (("--blocks", 3, "--json", "/tmp"), "is a folder"),
        (("--device-tokens", 16), "two pages at least"),
        (("--device-tokens", 256, "--sweep"), "all 8 requests are longer than the device's pool"),
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


def test_a_sweep_says_what_it_does_not_count(trace, tmp_path, capsys):
    path = tmp_path / "sweep.json"
    options = ("--device-tokens", 1600, "--sweep", 0, "--out", tmp_path, "--json", path)
    assert simulate(trace, *MODEL, *options) == 0
    told = "2 of 8 requests, 4,096 prompt tokens, are longer than the device's pool and not counted"
    assert told in " ".join(capsys.readouterr().out.split())
    with (tmp_path / "trace_sweep.csv").open() as file:
        (row,) = csv.DictReader(file)
    counted = [int(row[name]) for name in ("requests", "refused_requests", "refused_tokens")]
    found = json.loads(path.read_text())
    assert counted == [6, 2, 4096]
    assert [found[name] for name in ("requests", "refused_requests", "refused_tokens")] == [
        8,
        2,
        4096,
    ]


def test_a_small_trace_is_swept_too(tmp_path, capsys):
    rows = [mooncake(0, 40, 5, [1]), mooncake(9, 50, 5, [2])]
    path, out = write_lines(tmp_path / "small.jsonl", *rows), tmp_path / "out"
    assert simulate(path, *MODEL, "--device-tokens", 3072, "--sweep", "--out", out) == 0
    assert capsys.readouterr().err == ""
    with (out / "small_sweep.csv").open() as file:
        sizes = [float(row["host_gb"]) for row in csv.DictReader(file)]
    assert sizes == sorted(set(sizes)) and sizes[0] == 0 and len(sizes) > 1


def test_sizes_of_a_sweep_are_none_or_a_page_at_least_and_differ():
    assert sweep_sizes(0.00195, 0.001953125) == [0.0]
    assert sweep_sizes(0.001953125, 0.001953125) == [0.0, 0.001953125]
    assert sweep_sizes(64.0, 0.001) == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]


def test_figures_are_written_where_there_is_no_picture(trace, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = tmp_path / "sweep.json"
    options = ("--device-tokens", 3072, "--sweep", 1, "--out", tmp_path, "--json", path)
    assert simulate(trace, *MODEL, *options) == 0
    told = capsys.readouterr()
    assert "warning: no picture" in told.err and "trace_sweep.csv" in told.out
    assert len(json.loads(path.read_text())["runs"]) == 1
    assert (tmp_path / "trace_sweep.csv").exists() and not (tmp_path / "trace_sweep.png").exists()


def test_a_trace_without_blocks_has_no_share_of_them(tmp_path, capsys):
    path = write_tar(tmp_path / "s.tgz", a=session("a", call(0.0, 30, [])))
    assert simulate(path, "--blocks", 3) == 2
    assert "refers to no block" in capsys.readouterr().err
