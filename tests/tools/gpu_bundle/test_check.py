"""The run of a GPU machine: limits hold, a step that fails is a row, and the rest goes on."""

from __future__ import annotations

import dataclasses
import json
import sys
import time

import pytest

from tools.gpu_bundle.check import __main__ as check
from tools.gpu_bundle.check import reuse
from tools.gpu_bundle.check.limits import Overrun, limited, run
from tools.gpu_bundle.check.scale import DRY, H100
from tools.gpu_bundle.check.table import Table


def test_work_that_takes_longer_than_its_seconds_is_interrupted():
    with pytest.raises(Overrun, match="not done within"), limited(0.05):
        time.sleep(30)
    with limited(30):
        pass


def test_a_command_that_overruns_is_ended_with_all_that_it_started(tmp_path):
    psutil = pytest.importorskip("psutil")
    child = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); "
    child += "print(p.pid, flush=True); time.sleep(60)"
    with pytest.raises(Overrun):
        run([sys.executable, "-c", child], 2.0, tmp_path / "log")
    pid = int((tmp_path / "log").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_step_that_fails_is_a_row_and_the_next_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "SECONDS", {"environment": 20, "copies": 20})

    def broken(self, seconds):
        raise RuntimeError("no such device")

    monkeypatch.setattr(check.Commands, "environment", broken)
    monkeypatch.setattr(
        check.Commands, "copies", lambda self, s: self._table.row("copies", "x", "1")
    )
    (tmp_path / "logs").mkdir()
    assert check.Check(DRY, tmp_path).run(None) == 1
    rows = [json.loads(line) for line in (tmp_path / "table.jsonl").read_text().splitlines()]
    assert "no such device" in rows[0]["figure"]
    assert rows[-1]["step"] == "copies" and rows[-1]["figure"].startswith("done")


def test_a_row_is_on_disk_as_soon_as_it_is_written(tmp_path):
    Table(tmp_path).row("copies", "load", "44 GB/s", bytes=1)
    assert "44 GB/s" in (tmp_path / "table.txt").read_text()
    assert json.loads((tmp_path / "table.jsonl").read_text())["bytes"] == 1


@pytest.mark.parametrize("scale", [H100, DRY], ids=["H100", "dry run"])
def test_working_sets_are_what_they_should_be_beside_the_pool(scale):
    _, chats, _, unshared = reuse.phases(scale)
    lengths = chats.workload.prompt_lengths()
    assert len(lengths) == scale.chats * reuse.TURNS
    together = sum(sorted(lengths)[-scale.chats :])
    assert 3.5 * scale.pool < together < 4.5 * scale.pool
    longest_turns = sorted(lengths)[-scale.concurrency :]
    assert sum(longest_turns) <= scale.pool  # no server waits for room
    assert scale.documents * scale.document > 1.4 * scale.pool
    assert unshared.steps({"a": 1}) == 3


def test_documents_come_again_in_the_same_order():
    workload = reuse.documents_again(dataclasses.replace(DRY, documents=3, document=8))
    first, again = workload.turns[:3], workload.turns[3:]
    assert [turn.added[:8] for turn in first] == [turn.added[:8] for turn in again]
    assert len({turn.added for turn in workload.turns}) == 6
    assert len({turn.conversation for turn in workload.turns}) == 6
