"""What others were told of the pages in host memory, and what is still to be told.

The memory server knows page keys, not tokens; a worker knows the tokens of what it has had on its
device. Told is of what both know, under the name that SGLang gives a block in its events: the first
64 bits of its page key. Books only; one thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from smg_sglang.memory.changes import Entry
from smg_sglang.tree.page_keys import KEY_BYTES

BlockT = TypeVar("BlockT")

#: Blocks that are kept after they have left device and host memory: a page may have gone from the
#: device before it is heard that its copy came to host memory.
KEPT = 1 << 16


class HostPicture(Generic[BlockT]):
    """`BlockT` is what is told of a page when it comes."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._nowhere: dict[int, None] = {}  # blocks that are kept, in the order they left
        self._held: set[int] = set()
        self._blocks: dict[int, BlockT] = {}
        self._on_device: set[int] = set()
        self._told: set[int] = set()

    @property
    def told(self) -> frozenset[int]:
        """The names of all pages of which others think that they are there."""
        return frozenset(self._told)

    def on_device(self, name: int, block: BlockT) -> BlockT | None:
        """A block is on the device; it is to be told now where host memory has it, too, and nobody
        knew its tokens."""
        self._on_device.add(name)
        self._nowhere.pop(name, None)
        self._blocks[name] = block
        return self._tell(name)

    def off_device(self, name: int) -> None:
        """It has left the device."""
        self._on_device.discard(name)
        self._keep(name)

    def change(self, whole: bool, entries: Iterable[Entry]) -> Iterator[tuple[int, BlockT | None]]:
        """What is to be told of what the memory server says has come and gone, in order, or of all
        that it has (`whole`): (name, block) of a page that came, (name, None) of one that went."""
        if whole:
            entries = list(entries)
            here = {name for _, keys in entries for name in _names(keys)}
            yield from ((name, None) for name in self._held - here if self._go(name))
        for came, keys in entries:
            for name in _names(keys):
                if came:
                    self._held.add(name)
                    self._nowhere.pop(name, None)
                    if (block := self._tell(name)) is not None:
                        yield name, block
                elif self._go(name):
                    yield name, None

    def clear(self) -> None:
        """Others were told that nothing is anywhere."""
        self._held.clear()
        self._blocks.clear()
        self._on_device.clear()
        self._told.clear()
        self._nowhere.clear()

    def _go(self, name: int) -> bool:
        """Whether others think that it is there."""
        self._held.discard(name)
        self._keep(name)
        told = name in self._told
        self._told.discard(name)
        return told

    def _keep(self, name: int) -> None:
        """A block that is nowhere any more is kept for a while."""
        if name not in self._blocks or name in self._held or name in self._on_device:
            return
        self._nowhere[name] = None
        if len(self._nowhere) > self._kept:
            oldest = next(iter(self._nowhere))
            del self._nowhere[oldest], self._blocks[oldest]

    def _tell(self, name: int) -> BlockT | None:
        block = self._blocks.get(name)
        if block is None or name not in self._held or name in self._told:
            return None
        self._told.add(name)
        return block


def _names(keys: bytes) -> list[int]:
    return [
        int.from_bytes(keys[at : at + 8], "big", signed=True)
        for at in range(0, len(keys), KEY_BYTES)
    ]
