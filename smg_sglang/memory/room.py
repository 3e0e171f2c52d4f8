"""Whose pages go when memory is full: fair between namespaces, by the eviction policy within."""

import numpy as np

from smg_sglang.memory.slabs import SlabPool
from smg_sglang.memory.space import Space

#: A namespace that nobody was connected to for this long gives way before all others. Shorter
#: absences (a server restarts) cost it nothing.
DESERTED_S = 600.0


def make_room(space: Space, n: int, spaces: list[Space], pool: SlabPool) -> np.ndarray:
    """Up to `n` pages (int64, WRITING) for `space`; evicts as far as pins and fairness allow, and
    what is retained only where nothing else is left to go.

    The one that holds most bytes gives first, down to what the one in need holds; when the
    page sizes differ, whole slabs must run empty, which stops at the same limit.
    """
    parts = [space.pages.take(n)]
    for spare_retained in (True, False):
        exhausted: set[int] = set()
        while (missing := n - sum(map(len, parts))) and (
            victim := _next_victim(space, spaces, exhausted)
        ) is not None:
            if not _evict_for(space, victim, missing, pool, spare_retained=spare_retained):
                exhausted.add(id(victim))
            parts.append(space.pages.take(missing))
    return np.concatenate(parts)


def _next_victim(space: Space, spaces: list[Space], exhausted: set[int]) -> Space | None:
    """The space to evict from next; `space` itself when it is among the largest."""
    candidates = [s for s in spaces if id(s) not in exhausted and (s is space or _owes(s, space))]
    return max(candidates, key=lambda s: (_deserted(s), s.bytes_held, s is space), default=None)


def _deserted(space: Space) -> bool:
    return space.deserted_for() > DESERTED_S


def _owes(victim: Space, space: Space) -> bool:
    """Whether taking one page from `victim` makes things no less fair."""
    return _deserted(victim) or victim.bytes_held > space.bytes_held


def _evict_for(
    space: Space, victim: Space, missing: int, pool: SlabPool, *, spare_retained: bool
) -> int:
    """One round: pages evicted from `victim`; 0 when it has no more to give."""
    if victim.pages is space.pages:
        if victim is space or _deserted(victim):
            return victim.evict(missing, spare_retained=spare_retained)
        surplus = (victim.bytes_held - space.bytes_held) // space.namespace.page_bytes
        most = min(missing, max(1, surplus // 2))
        return victim.evict(most, spare_retained=spare_retained)
    before = pool.num_free
    evicted = 0
    while pool.num_free == before and _owes(victim, space):
        slab = victim.pages.geometry.pages_per_slab
        freed = victim.evict(slab, spare_retained=spare_retained)
        if not freed:
            break
        evicted += freed
    return evicted
