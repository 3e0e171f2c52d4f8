"""The ordering argument of docs/ordering.md for streams on CUDA, held against what the code does.

Scheduler, forwards and copies run as they would under SGLang's overlap, on streams that know what
comes after what (tests/fake_cuda): pass N + 1 is scheduled while pass N runs. Slots, rows of the
table, staging buffers and host pages are what may race.
"""

from __future__ import annotations

import random

import pytest
import torch

from smg_sglang.attention.device import joined
from smg_sglang.attention.host import HostReader
from smg_sglang.tier.host_pages import HostPages
from smg_sglang.transfer.cuda import CudaMover
from smg_sglang.transfer.pinning import ArenaPins
from smg_sglang.transfer.segments import SegmentRing
from tests.engine.streams.test_table import DEVICE, PAGE, Table
from tests.fake_cuda import FakeCuda
from tests.transfer import worlds

SEGMENT_PAGES = 3


class Reporting(CudaMover):
    """Says what its copies touch, where they are enqueued."""

    cuda: FakeCuda
    #: What a slot is in this mover's pool.
    place = "slot"

    def _move(self, layers, move, pages, *, to_arena):
        of_slots, of_pages = self.cuda.write, self.cuda.read
        if to_arena:
            of_slots, of_pages = of_pages, of_slots
        for slot in move.slots.tolist():
            of_slots((self.place, slot))
        for offset in move.offsets.tolist():
            of_pages(("page", move.arena.ctypes.data, offset))
        super()._move(layers, move, pages, to_arena=to_arena)


class Server:
    """One stream on a small device, SGLang's two streams, and its barrier between them."""

    def __init__(self, cuda, monkeypatch, *, barrier=True):
        self.cuda, self._barrier = cuda, barrier
        self.scheduler, self.forward = cuda.stream("scheduler"), cuda.stream("forward")
        mover = type("Mover", (Reporting,), {"cuda": cuda})
        staging = type("Staging", (mover,), {"place": "staging"})
        self.pins = ArenaPins()
        pool = worlds.make_pool(page_size=PAGE, layers=2, slots=DEVICE + PAGE)
        self.pool = pool
        self.mover = mover(pool, order_after=[self.forward], shared_pins=self.pins, programs=2)
        monkeypatch.setattr(
            "smg_sglang.transfer.segments.make_mover",
            lambda pool, pins: staging(pool, shared_pins=pins, programs=2),
        )
        cpu = torch.device("cpu")
        self.ring = SegmentRing(pool.layout, cpu, SEGMENT_PAGES, pins=self.pins)
        self.reader = HostReader(pool.layout, self.ring)
        self.table = Table(on_cuda=True)
        # Without a memory server pages go into memory of our own.
        self.table._pages = HostPages(lambda: None, lambda lease: None, self.mover, timeout_s=1)
        self.table._row = self._row
        self.stream = self.table.begin("a", 1)
        self.free, self.tokens = list(range(PAGE, DEVICE + PAGE)), 0
        self.table._cache.token_to_kv_pool_allocator.free = lambda slots: self.free.extend(
            slots.tolist()
        )

    def _row(self, req):
        """Whoever asks for the row writes it, too, or might."""
        self.cuda.write("row")
        return self.table._cache.req_to_token_pool.req_to_token[1]

    def run(self, new, step):
        """Schedule a pass that computes `new` tokens, and launch it."""
        with self.cuda.on(self.scheduler):
            step()
            begin, self.tokens = self.tokens, self.tokens + new
            slots = torch.tensor([self.free.pop(0) for _ in range(new)], dtype=torch.int32)
            self._row(None)[begin : self.tokens] = slots
            self.stream.req.kv.kv_committed_len = self.tokens
        self.forward.wait_stream(self.scheduler)
        with self.cuda.on(self.forward):
            self._attend(slots)
        if self._barrier:
            self.scheduler.wait_stream(self.forward)

    def _attend(self, new_slots):
        self.cuda.read("row")
        gone, runs = self.stream.resident_from, joined(self.stream.runs)
        row = self.table._cache.req_to_token_pool.req_to_token[1, gone : self.tokens].tolist()
        self.reader.begin()
        for layer in range(2):
            for slot in new_slots.tolist():
                self.cuda.write(("slot", slot))
            for rows in self.pool.rows[layer]:
                rows[new_slots.long()] = layer + 1
            self.reader.stream([runs] if runs else [])
            self.reader.start_layer(layer)
            for slot in row:
                self.cuda.read(("slot", slot))
            for parts in self.reader.segments(runs):
                self._read(parts, layer)

    def _read(self, parts, layer):
        first = (parts[0].data_ptr() - self.ring.parts[0].data_ptr()) // parts[0][0].nbytes
        for slot in range(first, first + len(parts[0])):
            self.cuda.read(("staging", slot))
        for part in parts:
            assert (part.contiguous().view(torch.uint8) == layer + 1).all()

    def prefill_and_generate(self, seed):
        rng = random.Random(seed)
        for _ in range(6):
            chunk = rng.randrange(1, DEVICE // 4)
            self.run(chunk, lambda: self.table.checkpoint(self.stream, self.tokens))
        short = rng.random() < 0.5
        for _ in range(25):
            least = PAGE if short and rng.random() < 0.2 else 2 * PAGE
            self.run(1, lambda least=least: self.table.leave_tail(self.stream, least))

    def close(self):
        # It has ended while its last pass runs: what it held is given back.
        with self.cuda.on(self.scheduler):
            self.table.close(self.stream.req)
        assert not self.cuda.driver.registered
        self.reader.begin()
        self.ring.close()
        self.mover.close()
        self.pins.close()


@pytest.mark.parametrize("seed", range(2))
def test_no_slot_page_row_or_buffer_is_touched_out_of_order(cuda, monkeypatch, seed):
    server = Server(cuda, monkeypatch)
    server.prefill_and_generate(seed)
    assert server.stream.resident_from > DEVICE // 2 and server.stream.failure is None
    server.close()
    assert not cuda.races


def test_without_sglangs_barrier_the_row_would_race(cuda, monkeypatch):
    """So the argument needs it: a change in SGLang would be seen in `test_contract`."""
    server = Server(cuda, monkeypatch, barrier=False)
    server.prefill_and_generate(0)
    server.close()
    assert {race[1] for race in cuda.races} == {"row"}
