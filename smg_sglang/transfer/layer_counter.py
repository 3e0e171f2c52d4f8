"""What the forward waits on: which layers of which batch of loads have landed.

Source: the interface of ``LayerWiseLoadCounter`` (sglang/srt/mem_cache/unified_cache/
unified_cache_linker.py) and ``LayerDoneCounter`` (sglang/srt/managers/cache_controller.py).
"""

from __future__ import annotations

import threading
import time

from smg_sglang.transfer.mover import Mark


class LoadBatch:
    """The layers of one batch; `land` is called by who loads, the waits by who reads.

    Attributes:
        keep_alive: what must live until the batch is finished.
        unwanted: set by the scheduler thread to have it left out, if it has not begun.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._marks: list[Mark] = []
        self._closed = False
        self._changed = threading.Condition()
        self.error: BaseException | None = None
        self.blocked_seconds = 0.0
        self.keep_alive: object = None
        self.unwanted = False

    def land(self, mark: Mark, layers: int = 1) -> None:
        """The next layers have been copied, or will have been when ``mark`` is reached."""
        with self._changed:
            self._marks.extend([mark] * layers)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """No further layer will land; who waits goes on, and `finish` says False."""
        with self._changed:
            self.error = error
            self._closed = True
            self._changed.notify_all()

    @property
    def settled(self) -> bool:
        """Whether all layers have landed or been enqueued, or the batch has failed."""
        return self._closed or len(self._marks) >= self._num_layers

    @property
    def landed(self) -> bool:
        """Whether nothing writes the batch's slots any more."""
        return self.settled and (not self._marks or self._marks[-1].reached())

    def wait(self, layer: int) -> None:
        """Return when the current stream is ordered after the copy of ``layer``."""
        mark = self._mark_of(layer)
        if mark is not None:
            mark.wait()

    def finish(self) -> bool:
        """Return when nothing writes the batch's slots any more; True when all layers landed."""
        self._mark_of(self._num_layers - 1)
        # One loader, in order: the last mark covers the ones before it.
        if self._marks:
            self._marks[-1].synchronize()
        self.keep_alive = None
        return self.error is None

    def _mark_of(self, layer: int) -> Mark | None:
        if layer >= len(self._marks) and not self._closed:
            started = time.perf_counter()
            with self._changed:
                self._changed.wait_for(lambda: layer < len(self._marks) or self._closed)
            self.blocked_seconds += time.perf_counter() - started
        return self._marks[layer] if layer < len(self._marks) else None


class LayerCounter:
    """Registered on SGLang's KV pool and worker, which call `set_consumer` and `wait_until`.

    Indices count up and are never used twice, so any number of batches may be in flight.

    Attributes:
        num_layers: of the pool.
        consumer_index: the batch the forward being run reads from, or -1.
        events: index -> batch, with ``.wait(layer)`` (speculative decoding calls it).
        blocked_seconds: CPU time that readers spent blocked in waits, of finished batches.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.consumer_index = -1
        self.producer_index = -1
        self.events: dict[int, LoadBatch] = {}
        self.blocked_seconds = 0.0

    def update_producer(self) -> int:
        """Open the next batch and return its index."""
        self.producer_index += 1
        self.events[self.producer_index] = LoadBatch(self.num_layers)
        return self.producer_index

    def set_consumer(self, index: int) -> None:
        self.consumer_index = index

    def wait_until(self, threshold: int) -> None:
        """Wait for layer ``threshold`` of the consumer's batch. Returns at once where the batch is
        -1 or finished. A failed load does not raise here; `finish` reports it."""
        batch = self.events.get(self.consumer_index)
        if batch is not None:
            batch.wait(threshold)

    def has_landed(self, index: int) -> bool:
        """Whether `finish` would not wait."""
        batch = self.events.get(index)
        return batch is None or batch.landed

    def finish(self, index: int) -> bool:
        """Wait for every layer of a batch and forget it; True when all landed (or unknown)."""
        batch = self.events.get(index)
        if batch is None:
            return True
        landed = batch.finish()
        self.blocked_seconds += batch.blocked_seconds
        del self.events[index]
        return landed

    def reset(self) -> None:
        """Wait for all batches and forget them."""
        for index in list(self.events):
            self.finish(index)
        self.consumer_index = -1
