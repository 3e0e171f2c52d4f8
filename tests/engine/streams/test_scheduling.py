"""What becomes of streams where memory is short. (tests/patches has what is admitted when.)"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from smg_sglang.engine.streams import scheduling as stream_scheduling
from smg_sglang.errors import MemoryUnavailable
from tests.engine.streams.test_table import DEVICE, PAGE, Table


def full(path, first, slots, shared):
    raise MemoryUnavailable("host memory has no room")


def begin(table, rid, row, tokens):
    """A stream that generates, of which nothing has left the device."""
    stream = table.begin(rid, row)
    table.compute(stream, 0, tokens)
    stream.req.finished, stream.req.to_finish = (lambda: False), None
    return stream


def decode(table, reqs, free=DEVICE):
    allocator = SimpleNamespace(available_size=lambda: free)
    cache = SimpleNamespace(streams=table, evictable_size=lambda: 0)
    stream_scheduling.before_check_decode_mem(
        SimpleNamespace(reqs=reqs, tree_cache=cache, token_to_kv_pool_allocator=allocator)
    )


@pytest.fixture
def table():
    return Table(on_cuda=False)


def test_a_stream_that_finds_no_room_anywhere_ends_with_the_reason(table, monkeypatch):
    stream = begin(table, "a", 1, 40)
    ordinary = SimpleNamespace(rid="b", to_finish=None)
    monkeypatch.setattr(table._pages, "keep", full)
    decode(table, [stream.req, ordinary])
    end = stream.req.to_finish.to_json()
    assert (end["type"], end["status_code"]) == ("abort", 503)
    assert end["message"] == "host memory has no room"
    assert ordinary.to_finish is None
    decode(table, [stream.req, ordinary])
    assert stream.req.to_finish.to_json() == end


def test_a_stream_that_ends_already_keeps_its_end(table, monkeypatch):
    finished, ending = begin(table, "a", 1, 40), begin(table, "b", 2, 40)
    finished.req.finished, ending.req.to_finish = (lambda: True), "a stop word"
    monkeypatch.setattr(table._pages, "keep", full)
    decode(table, [finished.req, ending.req])
    assert (finished.req.to_finish, ending.req.to_finish) == (None, "a stop word")


@pytest.mark.parametrize(("free", "stay"), [(DEVICE, PAGE + 2), (PAGE - 1, 2)])
def test_a_tail_stays_until_slots_are_short(table, free, stay):
    stream = begin(table, "a", 1, 40)
    table.checkpoint(stream, 40)
    table.compute(stream, 40, 40 + PAGE + 2)
    decode(table, [stream.req], free)
    assert 40 + PAGE + 2 - stream.resident_from == stay
