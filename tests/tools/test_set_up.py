import os
import sys
from pathlib import Path

import pytest

from tools import set_up

ROOT = Path(__file__).parents[2]


@pytest.fixture
def log(tmp_path, monkeypatch):
    monkeypatch.setattr(set_up, "LOG", tmp_path / "set_up.log")
    return tmp_path / "set_up.log"


def run(code):
    return set_up._run_with_progress([sys.executable, "-c", code])


def test_the_reason_for_a_failure_survives_a_thousand_warnings(log):
    status, tail = run(
        "print('ERROR: no such package')\n"
        "for i in range(1000): print('WARNING: noise', i)\n"
        "raise SystemExit(1)"
    )
    assert (status, tail) == (1, "ERROR: no such package")
    assert "noise 999" in log.read_text()


def test_byte_counts_stay_out_of_the_log(log):
    run("print('Progress 1 of 2'); print('Collecting torch')")
    assert log.read_text() == "Collecting torch\n"


def test_progress_tells_what_is_downloaded_and_how_much_is_left(capsys):
    progress = set_up.Progress(terminal=False)
    progress.see("Collecting torch")
    progress.see("  Downloading torch-2.14.1-cp311-cp311-manylinux_2_28_x86_64.whl (790.1 MB)")
    progress.see("Progress 79000000 of 790100000")
    progress._shown_at = float("-inf")
    progress.show()
    assert capsys.readouterr().err.endswith("1 packages, downloading torch 2.14.1, 79 of 790 MB\n")


def test_a_line_in_a_file_appears_at_most_every_ten_seconds(capsys):
    progress = set_up.Progress(terminal=False)
    progress._shown_at = float("-inf")
    for _ in range(100):
        progress.show()
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("said", "tries"),
    [("ReadTimeoutError: Read timed out.", 3), ("ERROR: No matching distribution", 1)],
)
def test_only_network_trouble_is_tried_again(monkeypatch, said, tries):
    runs = []
    monkeypatch.setattr(
        set_up, "_run_with_progress", lambda command: runs.append(command) or (1, said)
    )
    with pytest.raises(SystemExit, match="could not install"):
        set_up._pip("the project", "something")
    assert len(runs) == tries


def test_a_second_run_of_make_sets_nothing_up_again(tmp_path):
    """With a python that must not be called: the stamp alone decides."""
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".ready").touch()
    assert os.system(f"make -s -C {tmp_path} PYTHON=/none/python .venv/.ready") == 0
