"""What the doctor says of a directory for storage."""

import os

import pytest

from smg_sglang.doctor import disk
from smg_sglang.doctor.cli import main
from smg_sglang.doctor.finding import Verdict


def test_a_disk_is_measured_and_nothing_is_left(tmp_path):
    (found,) = disk.look_at_disk(str(tmp_path))
    assert "GiB free" in found.found
    assert found.verdict is not Verdict.WRONG
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("rate", "verdict"), [(1e8, Verdict.ADVICE), (2e9, Verdict.OK)])
def test_a_slow_disk_is_told(tmp_path, monkeypatch, rate, verdict):
    monkeypatch.setattr(disk, "direct_speed", lambda *_: {"read": rate, "write": rate})
    (found,) = disk.look_at_disk(str(tmp_path))
    assert found.verdict is verdict


def test_a_file_system_without_direct_io_is_told(tmp_path, monkeypatch):
    really_open = os.open

    def refuse(path, flags, *more, **options):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return really_open(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", refuse)
    assert disk.direct_speed(tmp_path) == {}


def test_a_directory_that_is_not_there_is_wrong():
    (found,) = disk.look_at_disk("/nowhere/at/all")
    assert found.verdict is Verdict.WRONG and "No such file" in found.found


def test_the_command_takes_a_directory(tmp_path, capsys):
    main(["--storage", str(tmp_path)])
    assert "storage, " in capsys.readouterr().out
