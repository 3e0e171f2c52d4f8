import logging
import os

import pytest

from smg_sglang.box import GIB, BoxMemory
from smg_sglang.memory.arena import create_memfd
from smg_sglang.memory.growth import Growth, margin_bytes

from .conftest import RunningServer
from .world import fresh_path

MIB = 1 << 20
TOTAL = 16 * GIB


class Box:
    """A box whose free memory the test sets, and an arena of 64 MiB in it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.now = 0.0
        self.readings = 0
        self.spare = 8 * MIB  # beyond the margin
        self.growth = Growth(fd, self.read, lambda: self.now)

    def read(self) -> BoxMemory:
        self.readings += 1
        return BoxMemory(TOTAL, margin_bytes(TOTAL) + self.spare)


@pytest.fixture
def box():
    fd = create_memfd(64 * MIB)
    yield Box(fd)
    os.close(fd)


def test_the_margin_fits_the_box():
    assert margin_bytes(16 * GIB) == 512 * MIB
    assert margin_bytes(100 * GIB) == 2 * GIB
    assert margin_bytes(GIB) == 128 * MIB


def test_the_arena_grows_until_the_margin_is_reached(box):
    assert box.growth.may_grow(8 * MIB)
    assert not box.growth.may_grow(9 * MIB)


def test_what_is_promised_but_not_written_counts_even_after_another_reading(box):
    assert box.growth.may_grow(8 * MIB)
    box.now += 1
    assert not box.growth.may_grow(12 * MIB)
    assert box.readings == 2


def test_what_the_arena_holds_already_may_be_used(box):
    os.posix_fallocate(box.fd, 0, 20 * MIB)
    box.spare = -MIB
    assert box.growth.may_grow(20 * MIB)
    assert box.readings == 0
    assert not box.growth.may_grow(21 * MIB)


def test_a_reading_serves_half_a_second(box):
    for _ in range(100):
        box.growth.may_grow(MIB)
        box.now += 0.01
    assert box.readings == 2


def test_a_box_that_cannot_be_looked_at_counts_as_short(box):
    def fail() -> BoxMemory:
        raise OSError("too many open files")

    growth = Growth(box.fd, fail)
    assert not growth.may_grow(MIB)


def test_a_shortage_is_told_once(box, caplog):
    with caplog.at_level(logging.INFO):
        for _ in range(50):
            box.growth.may_grow(30 * MIB)
            box.now += 1
        assert caplog.text.count("memory left") == 1
        box.spare = 64 * MIB
        box.now += 1
        assert box.growth.may_grow(30 * MIB)
    assert caplog.text.count("memory again") == 1


def test_a_server_in_a_full_box_answers_fewer_pages(directory, monkeypatch):
    monkeypatch.setattr(Growth.__init__, "__defaults__", (lambda: BoxMemory(TOTAL, 0), lambda: 0.0))
    server = RunningServer(directory, pretouch=False)
    connection = server.open()
    assert len(connection.reserve(fresh_path(3), 5).pages) == 0
    connection.close()
    server.stop()
