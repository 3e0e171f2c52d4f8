"""Socket directories do not outlive their servers, however those end."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from smg_sglang.engine.split import sockets as phase_sockets
from smg_sglang.errors import ConfigError


@pytest.fixture(autouse=True)
def tmpdir(tmp_path, monkeypatch):
    # pytest's own path is too long for sockets
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        monkeypatch.setattr(tempfile, "tempdir", short)
        yield short
        phase_sockets.remove_directories()


def test_a_directory_is_private_and_removed():
    path = phase_sockets.make_directory()
    assert path.stat().st_mode & 0o777 == 0o700
    (path / "socket").touch()
    phase_sockets.remove_directories()
    phase_sockets.remove_directories()
    assert not path.exists()


def test_those_of_the_dead_are_swept_and_those_of_the_living_are_not(tmpdir):
    code = (
        "import os, signal; from smg_sglang.engine.split import sockets as phase_sockets;"
        "print(phase_sockets.make_directory(), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TMPDIR": tmpdir},
        capture_output=True,
        text=True,
        check=False,
    )
    dead = done.stdout.strip()
    assert os.path.isdir(dead)
    first = phase_sockets.make_directory()
    assert not os.path.exists(dead)
    phase_sockets.make_directory()
    assert first.exists()


def test_what_only_has_the_name_is_not_swept(tmpdir):
    file, link, target = (Path(tmpdir, name) for name in ("smg-phase-a", "smg-phase-b", "others"))
    file.touch()
    target.mkdir()
    (target / "socket").touch()
    link.symlink_to(target)
    phase_sockets.make_directory()
    assert file.exists() and link.is_symlink() and (target / "socket").exists()


def test_directories_of_other_users_are_not_swept(tmpdir, monkeypatch):
    others = Path(tmpdir, "smg-phase-others")
    others.mkdir()
    monkeypatch.setattr(phase_sockets.os, "getuid", lambda: os.stat(others).st_uid + 1)
    phase_sockets.make_directory()
    assert others.exists()


def test_a_tmpdir_that_is_too_long_for_sockets_is_refused(tmpdir, monkeypatch):
    long = os.path.join(tmpdir, "x" * 100)
    os.mkdir(long)
    monkeypatch.setattr(tempfile, "tempdir", long)
    with pytest.raises(ConfigError, match="TMPDIR"):
        phase_sockets.make_directory()
    assert os.listdir(long) == []
