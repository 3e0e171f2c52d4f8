"""The storage level: which pages lie below host memory. Books only."""

from __future__ import annotations

from collections import OrderedDict

from smg_sglang.tree.page_keys import KEY_BYTES


class StorageLevel:
    """Pages by their keys; where there is a limit, the least recently used go first, as in SGLang's
    file backend. Follows `storage/service.py`: all published pages are written, once."""

    def __init__(self, most_pages: int) -> None:
        self._most = most_pages
        self._pages: OrderedDict[bytes, None] = OrderedDict()
        self.written = self.evicted = 0

    def __len__(self) -> int:
        return len(self._pages)

    def offer(self, path: bytes) -> None:
        """A prefix has been published: what is not here is written."""
        for key in _keys(path):
            if key in self._pages:
                self._pages.move_to_end(key)
                continue
            self._pages[key] = None
            self.written += 1
        while len(self._pages) > self._most:
            self._pages.popitem(last=False)
            self.evicted += 1

    def has(self, path: bytes, start: int) -> int:
        """How many pages of `path[start:]` are here, from the first on without a gap; used now."""
        found = 0
        for key in _keys(path)[start:]:
            if key not in self._pages:
                break
            self._pages.move_to_end(key)
            found += 1
        return found


def _keys(path: bytes) -> list[bytes]:
    return [path[at : at + KEY_BYTES] for at in range(0, len(path), KEY_BYTES)]
