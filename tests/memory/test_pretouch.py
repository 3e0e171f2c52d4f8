import os

import pytest

from smg_sglang.memory import pretouch
from smg_sglang.memory.arena import create_memfd
from smg_sglang.memory.pretouch import Pretouch

from .world import eventually

MIB = 1 << 20


@pytest.fixture
def arena_fd():
    fd = create_memfd(64 * MIB)
    yield fd
    os.close(fd)


def resident(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def test_memory_is_prepared_ahead_of_its_use_and_no_further(arena_fd, monkeypatch):
    monkeypatch.setattr(pretouch, "_AHEAD_BYTES", 8 * MIB)
    worker = Pretouch(arena_fd, 64 * MIB)
    worker.start()
    eventually(lambda: worker.touched == 8 * MIB)
    assert resident(arena_fd) == 8 * MIB
    worker.advance(16 * MIB)
    eventually(lambda: worker.touched == 24 * MIB)
    worker.advance(1000 * MIB)
    eventually(lambda: worker.touched == 64 * MIB)
    worker.stop()


def test_what_was_written_before_it_was_prepared_stays(arena_fd):
    os.pwrite(arena_fd, b"kept", 5000)
    worker = Pretouch(arena_fd, 64 * MIB)
    worker.start()
    eventually(lambda: worker.touched > 0)
    worker.stop()
    assert os.pread(arena_fd, 4, 5000) == b"kept"


def test_stopping_before_starting_is_fine(arena_fd):
    Pretouch(arena_fd, MIB).stop()


def test_a_box_short_of_memory_is_not_prepared_until_there_is_more(arena_fd, monkeypatch):
    monkeypatch.setattr(pretouch, "_SHORTAGE_PAUSE_S", 0.005)
    limit, asked = [12 * MIB], []

    def may_grow(end_bytes: int) -> bool:
        asked.append(end_bytes)
        return end_bytes <= limit[0]

    worker = Pretouch(arena_fd, 64 * MIB, may_grow)
    worker.start()
    eventually(lambda: asked.count(16 * MIB) > 1)
    assert worker.touched == resident(arena_fd) == 12 * MIB
    limit[0] = 64 * MIB
    eventually(lambda: worker.touched == 64 * MIB)
    worker.stop()
