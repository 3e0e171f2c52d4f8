"""The suite's records, and the documents and the picture that must be what they say."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.suite import __main__ as suite
from bench.suite import extract, measured, records
from bench.suite.child import GRACE_S, run
from bench.suite.effect import Effect, draw, drawn, effects
from bench.suite.figures import Figure, figure_from, lines, show
from bench.suite.parts import Part, parts

MACHINE = {
    "date": "2026-11-24T12:00:01+00:00",
    "cpu": "AMD EPYC 7763 64-Core Processor",
    "cores": 2,
    "memory_gib": 23.5,
    "gpu": None,
    "python": "3.11.7",
    "versions": {"sglang": "0.5.23", "torch": "2.9"},
    "commit": "0123456789abcdef",
}


def record(seconds=1.0, status="ok", date=MACHINE["date"], quick=False):
    figure = {"workload": "w", "what": "time", "unit": "s", "baseline": 2.0, "ours": seconds}
    part = {"name": "p", "status": status, "detail": "", "seconds": 3.0, "load": [0.1, 0.9]}
    part["figures"] = [figure] if status == "ok" else []
    return {"machine": MACHINE | {"date": date}, "quick": quick, "seconds": 4.0, "parts": [part]}


def test_several_runs_are_shown_as_their_median_and_their_extremes():
    assert show([3.0, 1.0, 2.0], "s") == "2.00 s [1.00 s .. 3.00 s]"
    assert show([0.5], "share") == "50.0%"
    assert show([], "ms") == "-"


def test_a_figure_that_only_one_run_has_is_not_lost():
    a, b = Figure("w", "x", "s", 1.0, 2.0), Figure("w", "y", "n", None, 3.0)
    assert [(line.what, line.ours) for line in lines([[a], [a, b]])] == [
        ("x", "2.00 s [2.00 s .. 2.00 s]"),
        ("y", "3"),
    ]


def test_an_unknown_unit_is_refused():
    with pytest.raises(ValueError, match="parsec"):
        figure_from({"workload": "w", "what": "x", "unit": "parsec", "baseline": 1, "ours": 1})


def test_records_are_appended_and_never_overwritten(tmp_path):
    path = records.append(record(), tmp_path)
    assert path == tmp_path / "2026-11-24-amd-epyc-7763-64-core-2-cores" / "120001-full.json"
    with pytest.raises(FileExistsError):
        records.append(record(), tmp_path)


def test_the_newest_full_runs_count_and_quick_ones_only_without_any(tmp_path):
    records.append(record(date="2026-11-23T12:00:00+00:00"), tmp_path)
    records.append(record(5.0, date="2026-11-24T12:00:00+00:00", quick=True), tmp_path)
    assert [r["quick"] for r in records.latest(tmp_path)] == [True]
    records.append(record(2.0, date="2026-11-24T13:00:00+00:00"), tmp_path)
    records.append(record(3.0, date="2026-11-24T14:00:00+00:00"), tmp_path)
    assert [r["quick"] for r in records.latest(tmp_path)] == [False, False]


def test_the_table_has_machine_versions_date_medians_and_what_failed():
    text = measured.render([record(1.0), record(3.0), record(status="timed out")])
    assert "2026-11-24" in text and "SGLang 0.5.23" in text and "AMD EPYC" in text
    assert "| w | time | 2.00 s [2.00 s .. 2.00 s] | 2.00 s [1.00 s .. 3.00 s] |" in text
    assert "- p: timed out, no reason given (2026-11-24T12:00)" in text


def test_only_what_is_between_the_markers_is_replaced():
    before = f"a\n{measured.BEGIN}\nold\n{measured.END}\nb"
    once = measured.replaced(before, "new")
    assert once == f"a\n{measured.BEGIN}\n\nnew\n\n{measured.END}\nb"
    assert measured.replaced(once, "new") == once
    with pytest.raises(ValueError, match="needs the lines"):
        measured.replaced("no markers", "new")


def test_the_documents_and_the_picture_show_what_is_recorded():
    assert measured.main(["--check"]) == 0, "run `make readme`"


@pytest.mark.parametrize("name", ["README", "RECORD", "PICTURE"])
def test_what_is_out_of_date_is_found_and_written_again(tmp_path, monkeypatch, name):
    monkeypatch.setattr(measured, "ROOT", tmp_path)
    for each in ("README", "RECORD", "PICTURE"):
        before = getattr(measured, each)
        monkeypatch.setattr(measured, each, tmp_path / before.name)
        (tmp_path / before.name).write_bytes(before.read_bytes())
    assert measured.main([]) == measured.main(["--check"]) == 0
    stale = getattr(measured, name)
    if name == "PICTURE":
        draw([Effect("Chats", "8 turns", 4.0, 1.0)], "a machine", stale)
    else:
        stale.write_text(measured.replaced(stale.read_text(), "of yesterday"))
    assert measured.main(["--check"]) == 1
    assert measured.main([]) == measured.main(["--check"]) == 0


def test_records_of_which_nothing_is_drawn_are_said_to_be_none():
    assert effects([[Figure("prompts that share nothing", "TTFT mean", "s", 1.0, 2.0)]]) == []
    assert measured.summary([], [record()]) == measured.render([])


def test_the_effect_is_the_median_of_all_runs_of_a_workload_by_what_it_is():
    def run(stock, ours):
        return [
            Figure("sessions.tgz: 60 requests", "TTFT mean", "s", stock, ours),
            Figure("19 chats of 8 turns, working set 1", "TTFT mean", "s", 5.0, None),
            Figure("19 chats of 8 turns, working set 1", "TTFT p50", "s", 9.0, 9.0),
        ]

    (found,) = effects([run(4.0, 1.0), run(6.0, 3.0), run(5.0, 1.5)])
    assert (found.name, found.stock, found.ours) == ("Coding agents", 5.0, 1.5)
    words = measured.summary([found], [record()])
    assert "coding agents 1.50 s and 5.00 s (SmolLM2-135M on 2 CPU cores" in words


def test_a_picture_knows_what_it_shows(tmp_path):
    picture, found = tmp_path / "effect.png", [Effect("Chats", "8 turns", 4.0, 1.0)]
    assert drawn(picture) == []
    draw(found, "a machine", picture)
    assert drawn(picture) == found


def test_every_recorded_run_can_be_read():
    for path in records.RESULTS.glob("*/*.json"):
        for part in json.loads(path.read_text())["parts"]:
            assert all(figure_from(row).workload for row in part["figures"])


def test_a_child_that_fails_or_hangs_is_told_from_one_that_ends(tmp_path):
    log = tmp_path / "logs" / "x.log"
    assert run([sys.executable, "-c", "print('so')"], log, 60).ok
    failed = run([sys.executable, "-c", "raise SystemExit('broken pipe')"], log, 60)
    assert failed.status == "failed" and "broken pipe" in failed.detail
    hung = run([sys.executable, "-c", "import time; time.sleep(600)"], log, 0.3)
    assert hung.status == "timed out"


def part(command, **more):
    limits = {"full": ((), 60.0), "quick": ((), 60.0)}
    return Part("p", ("-c", command), extract.own_figures, **limits, **more)


def test_a_part_that_writes_nonsense_fails_without_an_exception(tmp_path):
    words = f"open({str(tmp_path / 'p.json')!r}, 'w').write('[]')"
    found = suite.run_part(part(words), tmp_path, 600, quick=True)
    assert found["status"] == "failed" and "p.json" in found["detail"]


def test_a_part_whose_file_is_missing_is_not_run(tmp_path):
    found = suite.run_part(part("", needs=tmp_path / "trace.gz"), tmp_path, 600, quick=True)
    assert found["status"] == "not run" and "trace.gz" in found["detail"]


def test_a_run_ends_in_its_time(tmp_path):
    hangs = "import time; time.sleep(600)"
    found = suite.run_part(part(hangs), tmp_path, GRACE_S + 0.3, quick=True)
    assert found["status"] == "timed out"
    late = suite.run_part(part(hangs), tmp_path, 1.0, quick=True)
    assert late["status"] == "not run" and "--minutes" in late["detail"]


def test_all_parts_run_are_recorded_and_shown_whatever_becomes_of_them(
    tmp_path, monkeypatch, capsys
):
    figure = {"workload": "w", "what": "time", "unit": "s", "baseline": None, "ours": 1.5}
    good = f"open({str(tmp_path / 'p.json')!r}, 'w').write({json.dumps({'figures': [figure]})!r})"
    bad = replace(part("raise SystemExit('no luck')"), name="bad")
    monkeypatch.setattr(suite, "parts", lambda: [part(good), bad])
    where = ["--out", str(tmp_path), "--results", str(tmp_path / "results")]
    assert suite.main(["--quick", *where]) == 1
    (path,) = (tmp_path / "results").glob("*/*-quick.json")
    found = {one["name"]: one for one in json.loads(path.read_text())["parts"]}
    assert found["p"]["figures"] == [figure]
    assert found["bad"]["status"] == "failed" and "no luck" in found["bad"]["detail"]
    assert "1.50 s" in capsys.readouterr().out


def test_every_part_says_where_its_figures_go():
    for one in parts():
        words = one.arguments(quick=True, json=Path("/x/y.json"))
        assert "/x/y.json" in words and not any("{" in word for word in words)
