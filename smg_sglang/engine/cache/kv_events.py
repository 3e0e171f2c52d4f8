"""KV events of host memory, in the stream that SGLang publishes for the device.

SGLang tells routers which blocks its device holds (`--kv-events-config`). To these events are added
those of host memory, with SGLang's own names: medium CPU_PINNED, and the same hashes, since a block
is known by the first 64 bits of its page key. Blocks of tenants (`cache_salt`) and adapters have
hashes that differ from their page keys, and are told of for the device only.

Each worker tells of the pages that it can find and knows the tokens of: those that it has had on
its device. A thread asks the memory server what has come and gone, whoever put it there.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang.srt.disaggregation.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    StorageMedium,
)
from sglang.srt.mem_cache.events import KVCacheEventRecorder

from smg_sglang.errors import MemoryUnavailable
from smg_sglang.tier.connections import BACKGROUND_TIMEOUT_S
from smg_sglang.tier.host_picture import HostPicture

if TYPE_CHECKING:
    from smg_sglang.memory.changes import Entry
    from smg_sglang.memory.client import MemoryConnection
    from smg_sglang.tier.host_tier import HostTier

logger = logging.getLogger(__name__)

ASK_EVERY_S = 0.2


@dataclass(frozen=True)
class _News:
    """What the memory server said (`MemoryConnection.changes`), asked after so many flushes."""

    flushes: int
    whole: bool
    entries: list[Entry]


class HostEvents:
    """`take` is for the scheduler thread; a thread of its own asks the memory server."""

    def __init__(self, tier: HostTier, page_size: int) -> None:
        self._tier = tier
        self._picture: HostPicture[BlockStored] = HostPicture()
        self._recorder = KVCacheEventRecorder(enabled=True, page_size=page_size)
        self._news: queue.SimpleQueue[_News] = queue.SimpleQueue()
        self._flushes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="smg-events", daemon=True)
        self._thread.start()

    def take(self, device_events: list[Any]) -> list[Any]:
        """The device's events, and those of host memory that are due."""
        for event in device_events:
            self._recorder.enqueue(event)
            self._follow(event)
        while not self._news.empty():
            news = self._news.get()
            if news.flushes == self._flushes:
                for name, block in self._picture.change(news.whole, news.entries):
                    self._tell(name, block)
        events: list[Any] = self._recorder.take()
        return events

    def close(self) -> None:
        """Ask no more; idempotent."""
        self._stop.set()
        self._thread.join(timeout=5)

    def _follow(self, event: Any) -> None:
        """What the device's events say of its blocks."""
        if isinstance(event, AllBlocksCleared):
            # Whoever hears of it forgets host memory, too: all of that is told anew.
            self._picture.clear()
            self._flushes += 1
        elif isinstance(event, BlockRemoved):
            for name in event.block_hashes:
                self._picture.off_device(name)
        elif isinstance(event, BlockStored) and event.cache_salt is None and not event.lora_name:
            for block in _single(event):
                (name,) = block.block_hashes
                if (due := self._picture.on_device(name, block)) is not None:
                    self._tell(name, due)

    def _tell(self, name: int, block: BlockStored | None) -> None:
        if block is None:
            self._recorder.enqueue(BlockRemoved([name], medium=StorageMedium.CPU))
            return
        # A copy: the recorder joins what follows to what it was given.
        self._recorder.enqueue(
            BlockStored(
                [name],
                block.parent_block_hash,
                list(block.token_ids),
                block.block_size,
                None,
                medium=StorageMedium.CPU,
            )
        )

    def _run(self) -> None:
        known: MemoryConnection | None = None
        flushes = since = -1
        while not self._stop.wait(ASK_EVERY_S):
            connection = self._tier.connections.background()
            if connection is not known or flushes != self._flushes:
                since, flushes = -1, self._flushes
            if connection is None and known is not None:
                self._news.put(_News(flushes, True, []))
            known = connection
            if connection is None:
                continue
            try:
                changes = connection.changes(since, BACKGROUND_TIMEOUT_S)
            except MemoryUnavailable:
                since = -1
                continue
            since = changes.next
            if changes.whole or changes.entries:
                self._news.put(_News(flushes, changes.whole, changes.entries))


def _single(event: BlockStored) -> Iterator[BlockStored]:
    """Its blocks, one by one."""
    parent = event.parent_block_hash
    for at, name in enumerate(event.block_hashes):
        tokens = event.token_ids[at * event.block_size : (at + 1) * event.block_size]
        yield BlockStored([name], parent, tokens, event.block_size, None)
        parent = name
