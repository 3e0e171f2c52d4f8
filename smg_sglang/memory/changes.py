"""What came into a namespace and what left it, in order, for those who tell others of it."""

from collections import deque

from smg_sglang.tree.page_keys import KEY_BYTES

#: Page keys that a log holds: 16 MiB. Who asks less often than they last is told all there is.
CAPACITY = 1 << 20

Entry = tuple[bool, bytes]
"""Whether pages came, and their page keys, joined."""


class ChangeLog:
    """The newest changes, numbered. One thread."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._entries: deque[Entry] = deque()
        self._keys = 0
        self._first = 0

    @property
    def next(self) -> int:
        """The number of the change that comes next."""
        return self._first + len(self._entries)

    def add(self, came: bool, keys: bytes) -> None:
        """Pages came, or went."""
        if not keys:
            return
        self._entries.append((came, keys))
        self._keys += len(keys) // KEY_BYTES
        while self._keys > self._capacity:
            _, old = self._entries.popleft()
            self._keys -= len(old) // KEY_BYTES
            self._first += 1

    def restart(self) -> None:
        """More changed than is worth telling: whoever asks is told all there is."""
        self._first = self.next + 1
        self._entries.clear()
        self._keys = 0

    def since(self, number: int) -> list[Entry] | None:
        """Changes from this number on; None where they are not all known any more."""
        if not self._first <= number <= self.next:
            return None
        return [self._entries[at] for at in range(number - self._first, len(self._entries))]
