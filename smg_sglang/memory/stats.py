"""What the memory server counts."""

import msgspec

from smg_sglang.memory.namespace import Namespace


class Counters(msgspec.Struct):
    """Running totals since the server started; they only grow."""

    lookups: int = 0
    hits: int = 0
    """Lookups that leased at least one page."""
    hit_pages: int = 0
    reservations: int = 0
    pages_reserved: int = 0
    pages_short: int = 0
    """Pages that were asked for and not given because memory was full."""
    pages_published: int = 0
    pages_evicted: int = 0
    flushes: int = 0
    dropped: dict[str, int] = {}
    """Pages that never became readable, or were flushed, by reason."""

    def drop(self, reason: str, pages: int) -> None:
        """Count `pages` dropped for `reason`."""
        if pages:
            self.dropped[reason] = self.dropped.get(reason, 0) + pages

    def add(self, other: "Counters") -> None:
        """Add all of `other` to this."""
        for name in self.__struct_fields__:
            if name != "dropped":
                setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, pages in other.dropped.items():
            self.drop(reason, pages)


class NamespaceStats(msgspec.Struct, frozen=True):
    """One namespace: what it holds now, and its counters."""

    namespace: Namespace
    pages_ready: int
    pages_writing: int
    pages_retained: int
    connections: int
    leases: int
    reservations: int
    counters: Counters

    @property
    def bytes_held(self) -> int:
        """Bytes of its pages, readable or being written."""
        return (self.pages_ready + self.pages_writing) * self.namespace.page_bytes


def _in_all(name: str) -> property:
    return property(lambda stats: sum(getattr(space, name) for space in stats.namespaces))


class Stats(msgspec.Struct, frozen=True):
    """The whole server. `total` includes namespaces that are gone."""

    epoch: str
    uptime_s: float
    arena_bytes: int
    slab_bytes: int
    slabs: int
    slabs_free: int
    namespaces: list[NamespaceStats]
    total: Counters
    malformed: int
    """Messages that could not be understood."""
    strays: int
    """Messages of clients that were gone already, or never were."""
    refused: int
    """Connections that were turned away."""
    quarantined_pages: int = 0
    """Pages that connections hold which ended while their process lives (`departed`)."""

    #: Of all namespaces.
    pages_ready = _in_all("pages_ready")
    pages_writing = _in_all("pages_writing")
    pages_retained = _in_all("pages_retained")
    leases = _in_all("leases")
    reservations = _in_all("reservations")
    connections = _in_all("connections")

    @property
    def bytes_ready(self) -> int:
        """Bytes of readable pages."""
        return sum(s.pages_ready * s.namespace.page_bytes for s in self.namespaces)
