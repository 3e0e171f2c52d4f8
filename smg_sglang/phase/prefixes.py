"""What the controller remembers of prompts: who computed which prefix, approximately.

It may be wrong either way: pages are evicted without notice, and answers are never seen as tokens.
A wrong guess costs time: a prompt is computed where it disturbs, or goes through a prefill worker
that finds everything done.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

from smg_sglang.tree.page_keys import KEY_BYTES, page_keys

#: Tokens a block. Coarser than a page: it decides where a request goes, not what is reused.
BLOCK = 64
#: Blocks remembered, at least; twice as many at most. 16M tokens, about 50 MB.
CAPACITY = 1 << 18


def path_of(
    tokens: array[int] | Sequence[int], extra_key: str | None = None, cache_salt: str | None = None
) -> bytes:
    """Keys of the prompt's whole blocks, 16 bytes each, chained from the root."""
    return page_keys(tokens, BLOCK, extra_key=extra_key, cache_salt=cache_salt)


class Known(NamedTuple):
    """tokens: length of the longest prefix that was computed. worker: the decode worker that has
    it, None when nothing is known."""

    tokens: int
    worker: int | None


class Prefixes:
    """Blocks by key, in two generations: what is used in neither is forgotten.

    A block's value is its decode worker, and how many tokens that worker generated behind it.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._young: dict[bytes, tuple[int, int]] = {}
        self._old: dict[bytes, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def find(self, path: bytes) -> Known:
        """The longest known prefix, by bisection: a block is remembered only with its parents.

        (Forgetting may break that; then less is found.)
        """
        low, high = 0, len(path) // KEY_BYTES
        found: tuple[int, int] | None = None
        while low < high:
            middle = (low + high + 1) // 2
            value = self._get(path[(middle - 1) * KEY_BYTES : middle * KEY_BYTES])
            if value is None:
                high = middle - 1
            else:
                low, found = middle, value
        if found is None:
            return Known(0, None)
        worker, generated = found
        return Known(low * BLOCK + generated, worker)

    def learn(self, path: bytes, worker: int) -> None:
        """A decode worker has, or can load, all of this path."""
        for key in _keys(path):
            generated = (self._get(key) or (0, 0))[1]
            self._young[key] = (worker, generated)
        if len(self._young) > self._capacity:
            self._old, self._young = self._young, {}

    def grew(self, path: bytes, worker: int, tokens: int) -> None:
        """Behind this path the worker has generated `tokens` tokens."""
        if path:
            self._young[path[-KEY_BYTES:]] = (worker, tokens)

    def clear(self) -> None:
        """The cache was flushed."""
        self._young.clear()
        self._old.clear()

    def _get(self, key: bytes) -> tuple[int, int] | None:
        value = self._young.get(key)
        return self._old.get(key) if value is None else value


def _keys(path: bytes) -> list[bytes]:
    return [path[at : at + KEY_BYTES] for at in range(0, len(path), KEY_BYTES)]
