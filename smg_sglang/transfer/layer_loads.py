"""Loads of host pages into device slots, layer by layer, a batch of requests at a time."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass

import numpy as np
import torch

from smg_sglang.transfer.layer_counter import LayerCounter, LoadBatch
from smg_sglang.transfer.mover import BeforeCopy, Mark, Mover, PageMove

logger = logging.getLogger(__name__)


@dataclass
class LoadCounters:
    """Totals since start. ``seconds``: the loader's time (CUDA: of enqueueing)."""

    batches: int = 0
    pages: int = 0
    bytes: int = 0
    seconds: float = 0.0
    failed: int = 0


@dataclass(frozen=True)
class _Queued:
    moves: list[PageMove] | None
    keep_alive: object = None


@dataclass(frozen=True)
class _Task:
    batch: LoadBatch
    moves: list[PageMove]
    after: list[Mark]


class LayerLoads:
    """Queue loads per request, start all queued ones as one batch, finish the batch.

    All methods are for the scheduler thread; copies run on a loader thread, or, where the mover
    only enqueues (CUDA, pinned pages), on a side stream without any other thread.
    Paced, they always run on the thread, which lets each batch land before the next one begins: so
    that what has not begun can be given up.

    Attributes:
        counter: to be registered as SGLang's layer transfer counter.
        counters: totals, read at any time.
    """

    def __init__(
        self, mover: Mover, before_copy: BeforeCopy | None = None, *, paced: bool = False
    ) -> None:
        """``before_copy``: test hook, called on the loader thread before each layer's copy,
        or that of a group of layers (`Mover.load_groups`)."""
        self.counter = LayerCounter(mover.num_layers)
        self.counters = LoadCounters()
        self.mover = mover
        self._before_copy = before_copy
        self._paced = paced
        self._queued: dict[str, _Queued] = {}
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._last_in_thread: LoadBatch | None = None
        self._thread = threading.Thread(target=self._run, name="smg-load", daemon=True)
        self._thread.start()

    def queue(
        self,
        rid: str,
        slots: torch.Tensor,
        arena: np.ndarray,
        offsets: np.ndarray,
        keep_alive: object = None,
    ) -> None:
        """Queue the load of ``rid``; nothing moves before `start`.

        Args:
            slots, arena, offsets: as in `Mover.prepare`.
            keep_alive: held until `finish` or `cancel` (the arena, the lease).

        Raises:
            ValueError: a load of ``rid`` is queued already, or arguments that do not fit.
        """
        self.queue_moves(rid, [self.mover.prepare(slots, arena, offsets)], keep_alive)

    def queue_moves(self, rid: str, moves: list[PageMove], keep_alive: object = None) -> None:
        """As `queue`, for what the mover has prepared: pages of several pools, perhaps."""
        if rid in self._queued:
            raise ValueError(f"a load for request {rid} is queued already")
        self._queued[rid] = _Queued(moves, keep_alive)

    def queue_failed(self, rid: str, keep_alive: object = None) -> None:
        """Queue a load that will not be: the batch it starts with moves nothing and fails."""
        self._queued[rid] = _Queued(None, keep_alive)

    def cancel(self, rid: str) -> bool:
        """Forget a load that has not started; False when there is none (or it has started)."""
        return self._queued.pop(rid, None) is not None

    def start(self) -> int:
        """Start everything queued as one batch; its index, or -1 when nothing is queued."""
        if not self._queued:
            return -1
        queued, self._queued = list(self._queued.values()), {}
        index = self.counter.update_producer()
        batch = self.counter.events[index]
        batch.keep_alive = queued
        moves = PageMove.joined([move for q in queued for move in q.moves or ()])
        batch.unwanted = any(q.moves is None for q in queued)
        # The fence last: on CUDA, joining has put work on the current stream.
        task = _Task(batch, moves, self.mover.fence())
        if not self._paced and self._thread_is_idle() and self.mover.enqueues(task.moves):
            self._load(task)
        else:
            self._last_in_thread = task.batch
            self._tasks.put(task)
        return index

    def give_up(self, index: int) -> None:
        """Leave a started batch out if it has not begun; `finish` is False then."""
        self.counter.events[index].unwanted = True

    def has_landed(self, index: int) -> bool:
        """Whether `finish` would not wait."""
        return self.counter.has_landed(index)

    def finish(self, index: int) -> bool:
        """Wait until a started batch stops writing its slots; True when every layer landed."""
        return self.counter.finish(index)

    def reset(self) -> None:
        """Drop what is queued, wait for what has started."""
        self._queued.clear()
        self.counter.reset()

    def close(self) -> None:
        """`reset`, then end the thread; paced, what has not begun is given up. May be called
        twice."""
        if self._paced:
            for index in self.counter.events:
                self.give_up(index)
        self.reset()
        self._tasks.put(None)
        self._thread.join()

    def _thread_is_idle(self) -> bool:
        """Batches copy in start order, so none may overtake one that the thread still has."""
        return self._last_in_thread is None or self._last_in_thread.settled

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            self._load(task)
            del task  # or the last batch's mappings would live until the next one

    def _load(self, task: _Task) -> None:
        if task.batch.unwanted:
            task.batch.fail(CancelledError())
            return
        started = time.perf_counter()
        try:
            with self.mover.loading(task.moves, task.after) as moves:
                for layers in self.mover.load_groups(moves):
                    self._load_layers(layers, moves)
                    mark = self.mover.mark()
                    task.batch.land(mark, len(layers))
                if self._paced:
                    mark.synchronize()
        except BaseException as error:
            # The forward that waits must go on; `finish` tells the scheduler.
            logger.exception("loading pages from the memory tier failed")
            self.counters.failed += 1
            task.batch.fail(error)
        self.counters.batches += 1
        self.counters.pages += sum(move.num_pages for move in task.moves)
        self.counters.bytes += self.mover.bytes_of(task.moves)
        self.counters.seconds += time.perf_counter() - started

    def _load_layers(self, layers: range, moves: Sequence[PageMove]) -> None:
        if self._before_copy is not None:
            self._before_copy()
        for move in moves:
            self.mover.load_layers(layers, move)
