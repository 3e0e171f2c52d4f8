"""What a stream keeps on the device beside what host memory has, where that is worth it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from smg_sglang.attention.host import HostRun
from smg_sglang.engine.cache.radix_cache import SmgRadixCache
from smg_sglang.engine.streams import scheduling as stream_scheduling
from smg_sglang.engine.streams import table as module
from smg_sglang.engine.streams.limits import Limits
from smg_sglang.engine.streams.stream import Stream
from smg_sglang.engine.streams.table import Streams
from smg_sglang.tier.host_pages import Held, HostPages
from smg_sglang.transfer.layout import PageLayout, Part
from tests.engine.ranks import Ranks

PAGE, DEVICE = 4, 128


class Pages:
    """Host memory: says what was kept, as one run a call."""

    def __init__(self):
        self.kept, self.released, self.shared = [], [], []
        self.found = 0

    def keep(self, path, first, slots, shared=True):
        self.kept.append(slots.tolist())
        self.shared.append(shared)
        pages = slots.numel() // PAGE
        run = HostRun(np.zeros(1, np.uint8), np.arange(first, first + pages), PAGE)
        return [Held(run, None)]

    def find(self, path):
        return [Held(HostRun(np.zeros(1, np.uint8), np.arange(self.found), PAGE), None)]

    first = HostPages.first

    def release(self, held):
        self.released += held
        held.clear()


class Table(Streams):
    """Streams without a server: keys are made up, and memory is `Pages`."""

    def __init__(self, *, on_cuda):
        self.freed = []
        self._cache = SimpleNamespace(
            token_to_kv_pool_allocator=SimpleNamespace(
                size=DEVICE, free=lambda slots: self.freed.extend(slots.tolist())
            ),
            req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(3, 400, dtype=torch.int32)),
            least_of_ranks=lambda *facts: list(facts),
        )
        self._tier = SimpleNamespace(
            host_tokens=lambda: 4096,
            layout=SimpleNamespace(page_size=PAGE),
            device=torch.device("cpu"),
        )
        self._pages = Pages()
        self._by_rid = {}
        self._on_cuda = on_cuda

    @property
    def limits(self):
        return replace(super().limits, on_cuda=self._on_cuda)

    def _keys(self, req, begin, end, parent):
        pages = (end - begin) // PAGE
        return b"0123456789abcdef" * pages, ["hash"] * pages

    def begin(self, rid, row):
        """A stream, of which nothing is computed."""
        kv = SimpleNamespace(req_pool_idx=row, cache_protected_len=0, kv_committed_len=0)
        req = SimpleNamespace(rid=rid, kv=kv, prefix_len=0, refresh_fill_ids=lambda: None)
        self._by_rid[rid] = Stream(self, req, 4096)
        return self._by_rid[rid]

    def compute(self, stream, begin, end):
        """A pass gave tokens [begin, end) slots of the same number."""
        self._row(stream.req)[begin:end] = torch.arange(begin, end, dtype=torch.int32)
        stream.req.kv.kv_committed_len = end

    def check(self, stream, tokens):
        """Every token is on the device or in host memory, and what is read from there is exactly
        what has left the device."""
        gone = stream.resident_from
        assert gone % PAGE == 0 and gone <= stream.host_pages * PAGE
        assert sum(run.tokens for run in stream.runs) == gone
        row = self._row(stream.req)[:tokens].tolist()
        assert row == [self.filler] * gone + list(range(gone, tokens))
        assert stream.req.kv.cache_protected_len == gone
        assert self.freed == list(range(gone))


def test_the_newest_pages_stay_up_to_a_quarter_of_the_device():
    table = Table(on_cuda=True)
    stream = table.begin("a", 1)
    for step, (begin, end) in enumerate([(0, 20), (20, 60), (60, 103)]):
        table.compute(stream, begin, end)
        table.checkpoint(stream, end)
        assert stream.host_pages == end // PAGE
        assert stream.resident_from == [0, 60 - DEVICE // 4, 100 - DEVICE // 4][step]
        table.check(stream, end)
        stream.req.prefix_len = end
        slots = table.prefix_slots(stream)
        assert slots.dtype == torch.int64
        assert slots.tolist() == table._row(stream.req)[:end].tolist()
    # Every page was copied once.
    assert [slot for slots in table._pages.kept for slot in slots] == list(range(100))


def test_on_a_cpu_nothing_stays_that_host_memory_has():
    table = Table(on_cuda=False)
    stream = table.begin("a", 1)
    table.compute(stream, 0, 43)
    table.checkpoint(stream, 43)
    assert stream.resident_from == 40
    table.check(stream, 43)
    assert Limits(DEVICE, PAGE).resident == 0


def test_ranks_wait_for_each_other_where_one_reads_what_another_writes():
    waited = []
    tier = SimpleNamespace(
        pages=SimpleNamespace(),
        layout=PageLayout((Part("kv", 1, 8, 4),), 1, PAGE, "float32"),
        device=torch.device("cpu"),
        before_copy=None,
        pins=None,
    )
    Streams(SimpleNamespace(least_of_ranks=waited.append), tier)
    tier.pages.wait_for_ranks()
    assert waited == [0]


def test_streams_share_what_may_stay():
    table = Table(on_cuda=True)
    first, second = table.begin("a", 1), table.begin("b", 2)
    for stream in (first, second):
        table.compute(stream, 0, 80)
        table.checkpoint(stream, 80)
        assert stream.resident_from == 80 - DEVICE // 8


def test_tokens_gather_beside_what_stays_before_they_are_copied():
    table = Table(on_cuda=True)
    stream = table.begin("a", 1)
    table.compute(stream, 0, 80)
    table.checkpoint(stream, 80)
    tail = 2 * PAGE
    for length in range(81, 100):
        table.compute(stream, length - 1, length)
        table.leave_tail(stream, tail)
        table.check(stream, length)
        assert length - 1 - stream.host_pages * PAGE < tail
    assert len(table._pages.kept) == 3


def test_where_slots_are_short_nothing_stays_that_host_memory_has():
    table = Table(on_cuda=True)
    stream = table.begin("a", 1)
    table.compute(stream, 0, 80)
    table.checkpoint(stream, 80)
    table.compute(stream, 80, 82)
    table.leave_tail(stream, PAGE)
    assert stream.resident_from == 80
    table.check(stream, 82)


class Adder:
    """A prefill adder, of whose budgets `free` tokens are left beside what the table frees."""

    can_run_list, prefill_max_requests, rem_chunk_tokens, new_chunked_req = (), None, 64, None

    def __init__(self, table, free):
        self._table, self._free = table, free
        self.tree_cache = SimpleNamespace(streams=table)

    @property
    def rem_total_tokens(self):
        return self._free + len(self._table.freed)

    cur_rem_tokens = rem_total_tokens


def ordinary(tokens):
    params = SimpleNamespace(max_new_tokens=8)
    return SimpleNamespace(rid="b", full_untruncated_fill_ids=[0] * tokens, prefix_len=0,
                           sampling_params=params, output_ids=[])  # fmt: skip


@pytest.mark.parametrize(("tokens", "stays"), [(20, True), (40, False)])
def test_what_stays_goes_where_an_ordinary_request_would_wait_for_it(tokens, stays):
    table = Table(on_cuda=True)
    stream = table.begin("a", 1)
    table.compute(stream, 0, DEVICE // 4)
    table.checkpoint(stream, DEVICE // 4)
    assert stream.resident_from == 0
    verdict = stream_scheduling.admit(table, Adder(table, 40), ordinary(tokens), False)
    assert verdict is None  # SGLang decides
    assert stream.resident_from == (0 if stays else DEVICE // 4)
    table.check(stream, DEVICE // 4)


def test_what_stays_goes_where_a_streams_own_chunk_would_wait_for_it():
    table = Table(on_cuda=True)
    stream = table.begin("a", 1)
    table.compute(stream, 0, DEVICE // 4)
    table.checkpoint(stream, DEVICE // 4)
    adder = Adder(table, 2 * PAGE)
    assert stream_scheduling.chunk_limit(table, adder, stream.req) == DEVICE // 4 - PAGE
    assert stream.resident_from == DEVICE // 4


def test_what_host_memory_does_not_take_stays(monkeypatch):
    table = Table(on_cuda=True)
    stream = table.begin("a", 1)

    def full(path, first, slots, shared):
        raise module.MemoryUnavailable("full")

    monkeypatch.setattr(table._pages, "keep", full)
    table.compute(stream, 0, 80)
    table.checkpoint(stream, 80)
    assert stream.failure == "full" and stream.resident_from == 0
    table.leave_tail(stream, PAGE)
    table.check(stream, 80)


@pytest.mark.parametrize("prefix", [0, 40])
def test_a_stream_that_begins_has_no_slots(prefix):
    table = Table(on_cuda=True)
    stream = table.begin("a", None)
    stream.resident_from = stream.req.prefix_len = prefix
    assert table.prefix_slots(stream).tolist() == [PAGE - 1] * prefix


def test_a_stream_that_ends_lets_go_of_all_it_held():
    table = Table(on_cuda=False)
    first, second = table.begin("a", 1), table.begin("b", 2)
    for stream in (first, second):
        table.compute(stream, 0, 43)
        table.checkpoint(stream, 43)
    held = list(first.held)
    table.close(first.req)
    table.close(first.req)
    assert table._pages.released == held and not first.held
    assert list(table) == [second] and second.held
    assert table.host_room() == table.host_tokens() - second.host_need


def test_a_request_ends_its_own_stream_only():
    table = Table(on_cuda=False)
    stream = table.begin("a", 1)
    table.close(SimpleNamespace(rid="a"))
    assert table.get(stream.req) is stream


def test_what_was_begun_before_new_weights_is_not_shared_any_more():
    table = Table(on_cuda=False)
    former = table.begin("a", 1)
    table.compute(former, 0, 40)
    table.checkpoint(former, 20)
    table.weights_changed()
    table.checkpoint(former, 40)
    new = table.begin("b", 2)
    table.compute(new, 0, 20)
    table.checkpoint(new, 20)
    assert table._pages.shared == [True, False, True]


# ---- several ranks ----


@pytest.fixture
def ranks():
    """Streams of two ranks, in step."""
    with Ranks([Table(on_cuda=True), Table(on_cuda=True)]) as ranks:
        for rank, table in enumerate(ranks.members):
            ranks.join(rank, table._cache)
            table._cache.least_of_ranks = partial(SmgRadixCache.least_of_ranks, table._cache)
        yield ranks


def computed(table, tokens):
    stream = table.begin("a", 1)
    table.compute(stream, 0, tokens)
    table.checkpoint(stream, tokens)
    return stream


def test_what_the_host_memory_of_one_rank_does_not_take_stays_on_all(ranks):
    first, second = ranks.members
    keep = second._pages.keep

    def full(*args):
        raise module.MemoryUnavailable("full")

    second._pages.keep = full
    streams = ranks.each(computed, 80)
    assert [stream.failure for stream in streams] == [
        "another rank could not move pages to host memory; its log says why",
        "full",
    ]
    for table, stream in zip(ranks.members, streams, strict=True):
        assert (stream.resident_from, stream.host_pages, stream.held) == (0, 0, [])
        table.check(stream, 80)
    assert sum(part.num_pages for part in first._pages.released) == 20
    second._pages.keep = keep
    ranks.each(lambda table: table.checkpoint(table.by_rid("a"), 80))
    for table, stream in zip(ranks.members, streams, strict=True):
        assert (stream.failure, stream.resident_from) == (None, 80 - DEVICE // 4)
        table.check(stream, 80)


def test_a_prefix_is_as_long_as_all_ranks_have_it(ranks):
    for table, found in zip(ranks.members, (20, 7), strict=True):
        table._pages.found = found

    def open_one(table):
        req = SimpleNamespace(
            rid="a",
            full_untruncated_fill_ids=[0] * 200,
            _compute_max_prefix_len=lambda length: length - 1,
            sampling_params=SimpleNamespace(max_new_tokens=8),
            output_ids=[],
            prefix_len=0,
        )
        stream = table.open(req)
        return stream.resident_from, stream.host_pages, [part.num_pages for part in stream.held]

    assert ranks.all(open_one) == (28, 7, [7])


def test_host_memory_has_room_for_what_every_rank_has_room_for(ranks):
    ranks.members[0]._tier.host_tokens = lambda: 1024
    assert ranks.all(Table.host_tokens) == 1024
    ranks.each(Table.begin, "a", 1)
    assert ranks.all(Table.host_room) == 1024 - 4096
