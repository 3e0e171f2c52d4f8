import os
import shutil
import tempfile

import pytest

from smg_sglang.errors import ConfigError
from smg_sglang.memory.address import Address
from smg_sglang.memory.private_dirs import MEMORY_DIRS
from smg_sglang.memory.process import MemoryProcess


def make():
    path, mark = MEMORY_DIRS.make()
    return str(path), mark


@pytest.fixture
def tmpdir_of_ours(directory, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", directory)
    return directory


def test_directories_of_the_dead_are_swept_and_those_of_the_living_stay(tmpdir_of_ours):
    owned, mark = make()  # its server is about to be restarted
    os.close(Address.parse(owned).claim())
    served, other_mark = make()  # its owner died, its server is about to
    lock = Address.parse(served).claim()
    os.close(other_mark)
    dead, dead_mark = make()
    os.close(Address.parse(dead).claim())
    os.close(dead_mark)
    fresh = tempfile.mkdtemp(prefix="smg-memory-")
    os.symlink(dead, f"{tmpdir_of_ours}/smg-memory-link")
    assert MEMORY_DIRS.sweep() == 1
    assert not os.path.exists(dead)
    assert all(os.path.isdir(path) for path in (owned, served, fresh))
    os.close(lock)
    os.close(mark)
    assert MEMORY_DIRS.sweep() == 2


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to give a directory away")
def test_directories_of_other_users_are_left_alone(tmpdir_of_ours):
    theirs, mark = make()
    os.close(Address.parse(theirs).claim())
    os.close(mark)
    os.chown(theirs, 65534, 65534)
    assert MEMORY_DIRS.sweep() == 0


def test_an_embedded_server_sweeps_when_it_starts(tmpdir_of_ours):
    dead, mark = make()
    os.close(Address.parse(dead).claim())
    os.close(mark)
    process = MemoryProcess.start(4 << 20, pretouch=False)
    assert os.listdir(tmpdir_of_ours) == [os.path.basename(process.address)]
    assert MEMORY_DIRS.sweep() == 0
    process.stop()
    assert not os.listdir(tmpdir_of_ours)


def test_a_tmpdir_too_long_for_a_socket_is_named(directory, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", f"{directory}/{'x' * 90}")
    with pytest.raises(ConfigError, match="set TMPDIR to a shorter"):
        MemoryProcess.start(4 << 20)


def test_a_tmpdir_that_is_gone_is_one_sentence(directory, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", directory)
    shutil.rmtree(directory)
    with pytest.raises(ConfigError, match=r"in TMPDIR .*No such file"):
        MemoryProcess.start(4 << 20)
