"""One worker of SGLang with our cache: its scheduler's steps, without a model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from smg_sglang.config import WritePolicy
from smg_sglang.simulate.clock import Clock
from smg_sglang.simulate.device import NONE, STORED, WAITING, DeviceLevel
from smg_sglang.simulate.flight import Flight
from smg_sglang.simulate.host import HostLevel, Spill
from smg_sglang.simulate.paths import request_path
from smg_sglang.simulate.settings import Settings
from smg_sglang.simulate.tally import Tally
from smg_sglang.trace.request import Request
from smg_sglang.tree.node import Node

Batch = list[tuple[Flight, int]]
"""Requests of a prefill step, each with the prompt tokens it computes."""


class Worker:
    """First come, first served; prompts before answers, in chunks, as SGLang does by default.

    An answer's tokens come every `itl_ms`, whatever else runs; its pages are taken when it begins.
    """

    def __init__(self, settings: Settings, clock: Clock, tally: Tally) -> None:
        self.settings = settings
        self.tally = tally
        self._clock = clock
        self.host = HostLevel(settings, clock.now, clock.at) if settings.host_bytes else None
        write_back = settings.write_policy is WritePolicy.WRITE_BACK
        self.device = DeviceLevel(
            settings.device_pages, self._spill_leaf if write_back and self.host else None
        )
        self.on_finish: Callable[[], None] = lambda: None
        self._waiting: deque[Flight] = deque()
        self._chunked: Flight | None = None
        self._running = self._answering = 0
        self._promised = 0
        self._stepping = False
        self._woken = False
        self._stall_s = 0.0

    def submit(self, request: Request) -> None:
        """A request has arrived. One that can never fit is counted and turned away."""
        if not self.settings.fits(request):
            self.tally.refuse(request)
            self.on_finish()
            return
        path = request_path(request, self.settings.page_size)
        needed = self.settings.needed_pages(request)
        self._waiting.append(Flight(request, path, self._clock.now(), needed))
        self._wake()

    # ---- a prefill step ----

    def _wake(self) -> None:
        """Step as soon as all else that happens now has happened: SGLang takes in all requests
        that have arrived before it plans a step."""
        if not (self._woken or self._stepping):
            self._woken = True
            self._clock.at(self._clock.now(), self._step)

    def _step(self) -> None:
        self._woken = False
        batch = self._batch()
        if not batch:
            return
        self._stepping = True
        for flight, tokens in batch:
            self._extend(flight, tokens)
        compute = sum(self.settings.compute_s(f.done, f.done + tokens) for f, tokens in batch)
        loads = sum(f.host_pages for f, _ in batch if f.lease is not None)
        seconds = max(compute, self.settings.link_s(loads)) + self._stall_s
        self._stall_s = 0.0
        self._clock.at(self._clock.now() + seconds, self._end_step, batch)

    def _batch(self) -> Batch:
        """Who computes what next. All are matched before any takes pages, so that two with one
        new prefix both compute it."""
        batch: Batch = []
        budget = self.settings.chunk_tokens
        if self._chunked is not None:
            budget = self._add(batch, self._chunked, budget)
        for flight in list(self._waiting):
            if budget <= 0 or self._chunked is not None:
                break
            if self._running >= self.settings.max_running:
                break
            if flight.fetching or self._fetches(flight):
                continue  # passed over
            if not self._admit(flight):
                break
            self._waiting.remove(flight)
            budget = self._add(batch, flight, budget)
        return batch

    def _fetches(self, flight: Flight) -> bool:
        """Whether it is to wait for storage, which it asks once: what is not brought within the
        longest wait is computed."""
        if self.host is None or self.host.storage is None or flight.asked_storage:
            return False
        flight.asked_storage = True
        path = flight.path.head(flight.path.matchable)
        device = self.device.tree.match(path).length
        lease, found = self.host.find(path, device)
        self.host.release(lease)
        start = device + found
        stored = self.host.storage.has(path, start)
        most = int(self.settings.storage_wait_ms / 1000 / self.settings.fetch_s(1))
        pages = min(stored, most)
        if not stored:
            return False
        flight.fetching = True
        wait_s = min(self.settings.fetch_s(stored), self.settings.storage_wait_ms / 1000)
        self._clock.at(self._clock.now() + wait_s, self._fetched, flight, start, pages)
        return True

    def _fetched(self, flight: Flight, start: int, pages: int) -> None:
        assert self.host is not None
        flight.fetching = False
        if pages:
            flight.stored_pages = self.host.bring(flight.path.head(start + pages), start)
        self._wake()

    def _add(self, batch: Batch, flight: Flight, budget: int) -> int:
        tokens = min(flight.remaining, budget)
        if tokens < flight.remaining:
            tokens -= tokens % self.settings.page_size
        self._chunked = flight if tokens < flight.remaining else None
        if tokens:
            batch.append((flight, tokens))
        return budget - tokens if self._chunked is None else 0

    def _admit(self, flight: Flight) -> bool:
        """Match, lock and load; False where the pool has no room for all of the request."""
        path = flight.path
        match = self.device.tree.match(path.head(path.matchable))
        node = self.device.touch(match)
        self.device.lock(node)
        needed = flight.needed_pages - match.length
        if self.device.available() - self._promised < needed:
            self.device.unlock(node)
            return False
        flight.node, flight.in_tree = node, match.length
        flight.device_pages = match.length
        flight.pages = match.pages.copy()
        flight.promised = needed
        self._promised += needed
        self._running += 1
        self._load(flight)
        flight.done = (flight.device_pages + flight.host_pages) * self.settings.page_size
        self.tally.admit(flight)
        return True

    def _load(self, flight: Flight) -> None:
        path = flight.path
        if self.host is None:
            return
        if flight.device_pages == path.matchable:
            self.host.touch(path.head(path.matchable))
            return
        lease, found = self.host.find(path.head(path.matchable), flight.device_pages)
        if found:
            flight.lease, flight.host_pages = lease, found
            self._take(flight, found)

    def _extend(self, flight: Flight, tokens: int) -> None:
        page = self.settings.page_size
        # SGLang asks for a page more than the tokens fill.
        self.device.make_free(-(-tokens // page) + 1)
        self._take(flight, -(-(flight.done + tokens) // page) - len(flight.pages))

    def _take(self, flight: Flight, pages: int) -> None:
        self.device.make_free(pages)
        flight.pages = np.concatenate([flight.pages, self.device.take(pages)])
        flight.promised -= pages
        self._promised -= pages

    def _end_step(self, batch: Batch) -> None:
        self._stepping = False
        for flight, tokens in batch:
            flight.done += tokens
            if self.host is not None and flight.lease is not None:
                self.host.release(flight.lease)
                flight.lease = None
            self._insert(flight, flight.done // self.settings.page_size)
            if not flight.remaining:
                self._answer(flight)
        self._wake()

    # ---- an answer ----

    def _answer(self, flight: Flight) -> None:
        self.tally.first_token(flight, self._clock.now())
        self._answering += 1
        self._take_for_answer(flight)
        seconds = max(flight.request.output_tokens - 1, 0) * self.settings.itl_ms / 1000
        self._clock.at(self._clock.now() + seconds, self._finish, flight)

    def _take_for_answer(self, flight: Flight) -> None:
        """In each step SGLang makes room as if every answer needed another page, whether or not
        one does."""
        request, page = flight.request, self.settings.page_size
        while flight.promised:
            self.device.make_free(self._answering)
            self._take(flight, 1)
        if (request.input_tokens + max(request.output_tokens, 1) - 1) % page:
            self.device.make_free(self._answering)

    def _finish(self, flight: Flight) -> None:
        total = len(flight.path)
        self._insert(flight, total)
        if 0 < flight.path.prompt < total:
            # SGLang inserts the prompt once more, so that the answer goes before it.
            tree = self.device.tree
            tree.renew(tree.match(flight.path.head(flight.path.prompt)))
        self.device.give(flight.pages[total:])
        assert flight.node is not None
        self.device.unlock(flight.node)
        self._running -= 1
        self._answering -= 1
        self.tally.finish(flight)
        self.on_finish()
        self._wake()

    # ---- what goes into the tree, and below ----

    def _insert(self, flight: Flight, pages: int) -> None:
        """Give the tree the first pages; where it has them already, use the tree's."""
        path = flight.path.head(pages)
        tree = self.device.tree
        own = flight.pages[flight.in_tree : pages]
        inserted = tree.insert(path, own, flight.in_tree)
        self.device.give(inserted.duplicates)
        flight.pages[:pages] = tree.match(path).pages
        assert flight.node is not None
        self.device.lock(inserted.node)
        self.device.unlock(flight.node)
        flight.node, flight.in_tree = inserted.node, pages
        new = flight.pages[flight.counted : pages]
        self.device.inserts[new] += 1
        if self.host is not None:
            self._spill_new(self.host, flight, new)
        flight.counted = max(flight.counted, pages)

    def _spill_new(self, host: HostLevel, flight: Flight, pages: np.ndarray) -> None:
        """Copy what has been inserted often enough, by its whole path."""
        device = self.device
        due = device.inserts[pages] >= self.settings.write_policy.uses_before_spill
        due &= device.copies[pages] == NONE
        if not due.any():
            return
        end = flight.counted + int(np.flatnonzero(due)[-1]) + 1
        path = flight.path.head(end)
        node = device.tree.match(path).node
        own = pages[due]
        device.lock(node)
        device.copies[own] = WAITING
        host.spill(Spill(path, len(own), lambda done: self._spilled(node, own, done)))

    def _spilled(self, node: Node, pages: np.ndarray, done: bool) -> None:
        self.device.copies[pages] = STORED if done else NONE
        self.device.unlock(node)
        self._wake()

    def _spill_leaf(self, leaf: Node) -> None:
        """Write-back: the scheduler waits for the copy."""
        assert self.host is not None
        self._stall_s += self.host.spill_now(self.device.tree.path_to(leaf))
