"""How much of host memory may be retained, by one tenant and by all."""

from __future__ import annotations

from smg_sglang.memory.space import Space
from smg_sglang.tree.radix_tree import Heeded

#: No hint holds for longer: whoever sent it may have died.
LONGEST_S = 86_400.0


class Hinting:
    """What clients say of prefixes, carried out within bounds. No sockets; one thread."""

    def __init__(self, arena_bytes: int, share: float) -> None:
        """share: of the arena, that one tenant may retain. All of them together may have half of
        what that leaves, too: somebody else always finds room that is nobody's."""
        self._most_bytes = share * arena_bytes
        self._most_of_all = (1 + share) / 2 * arena_bytes

    def retain(
        self, space: Space, spaces: list[Space], path: bytes, seconds: float, tenant: bytes
    ) -> Heeded:
        """Let what is here of `path` go after all that is not retained, for so long; 0: no longer.
        As far as the tenant's share goes, from the beginning."""
        for each in spaces:
            each.expire()
        if not seconds > 0:
            return space.tree.end_retain(path)
        until = space.now() + min(seconds, LONGEST_S)
        return space.tree.retain(path, until, tenant, self._pages_left(space, spaces, tenant))

    def _pages_left(self, space: Space, spaces: list[Space], tenant: bytes) -> int:
        mine = sum(each.retained_bytes(tenant) for each in spaces)
        of_all = sum(each.retained_bytes() for each in spaces)
        left = min(self._most_bytes - mine, self._most_of_all - of_all)
        return max(0, int(left) // space.namespace.page_bytes)
