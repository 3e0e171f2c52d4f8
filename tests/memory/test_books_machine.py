"""Random histories of the books against a naive twin that knows what each page contains."""

from itertools import pairwise

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from smg_sglang.memory.books import Books

from .world import make_namespace, make_path

# Two share a page size, one has another, one has pages larger than a slab.
NAMESPACES = [
    make_namespace("a"),
    make_namespace("b"),
    make_namespace("c", 2500),
    make_namespace("d", 10_000),
]
PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=7).map(lambda keys: make_path(*keys))


def prefixes(path: bytes) -> list[bytes]:
    return [path[:end] for end in range(16, len(path) + 1, 16)]


class Twin:
    """Sets of readable prefixes, and what was last written to each page."""

    def __init__(self) -> None:
        self.readable = {namespace: set() for namespace in NAMESPACES}
        self.content: dict[tuple[int, int], object] = {}  # (page_bytes, page) -> prefix
        self.generation = dict.fromkeys(NAMESPACES, 0)


class BooksMachine(RuleBasedStateMachine):
    clients = Bundle("clients")
    leases = Bundle("leases")
    reservations = Bundle("reservations")

    @initialize(slabs=st.integers(2, 12))
    def start(self, slabs):
        self.books = Books(slabs * 4096, 4096)
        self.twin = Twin()
        self.spaces = {}
        self.held = {}  # (client, id) -> (namespace, [(page, prefix)])
        self.writing = {}  # (client, id) -> (namespace, generation, path, have, pages)
        self.ids = iter(range(1 << 30))

    @rule(target=clients, namespace=st.sampled_from(NAMESPACES))
    def connect(self, namespace):
        if namespace.page_bytes > self.books._arena_bytes:
            return multiple()
        name = str(next(self.ids)).encode()
        self.books.connect(name, namespace)
        self.spaces[name] = namespace
        return name

    @rule(target=leases, client=clients, path=PATHS, start=st.integers(0, 3))
    def lookup(self, client, path, start):
        if client not in self.spaces:
            return multiple()
        namespace, id_ = self.spaces[client], next(self.ids)
        pages = self.books.lookup(client, id_, path, start).tolist()
        wanted = prefixes(path)[start : start + len(pages)]
        for page, prefix in zip(pages, wanted, strict=True):
            assert prefix in self.twin.readable[namespace]
            assert self.twin.content[namespace.page_bytes, page] == (namespace, prefix)
        if not self._evicted():
            known = [p for p in prefixes(path)[start:] if p in self.twin.readable[namespace]]
            assert len(pages) == len(known)
        if not pages:
            return multiple()
        self.held[client, id_] = (namespace, list(zip(pages, wanted, strict=True)))
        return client, id_

    @rule(lease=consumes(leases))
    def release(self, lease):
        if self.held.pop(lease, None):
            self.books.release(*lease)

    @rule(client=clients, path=PATHS)
    def touch(self, client, path):
        if client in self.spaces:
            self.books.touch(client, path)

    @rule(target=reservations, client=clients, path=PATHS)
    def reserve(self, client, path):
        if client not in self.spaces:
            return multiple()
        namespace, id_ = self.spaces[client], next(self.ids)
        have, pages = self.books.reserve(client, id_, path)
        assert have + len(pages) <= len(path) // 16
        for page in pages.tolist():
            self.twin.content[namespace.page_bytes, page] = "being written"
        if not len(pages):
            return multiple()
        generation = self.twin.generation[namespace]
        self.writing[client, id_] = (namespace, generation, path, have, pages.tolist())
        return client, id_

    @rule(reservation=consumes(reservations))
    def publish(self, reservation):
        if reservation not in self.writing:
            return
        namespace, generation, path, have, pages = self.writing.pop(reservation)
        written = prefixes(path)[have : have + len(pages)]
        for page, prefix in zip(pages, written, strict=True):
            self.twin.content[namespace.page_bytes, page] = (namespace, prefix)
        self.books.publish(*reservation)
        if generation == self.twin.generation[namespace]:
            self.twin.readable[namespace].update(written)

    @rule(reservation=consumes(reservations))
    def abandon(self, reservation):
        if self.writing.pop(reservation, None):
            self.books.abandon(*reservation)

    @rule(client=clients)
    def flush(self, client):
        if client in self.spaces:
            namespace = self.spaces[client]
            self.books.flush(client)
            self.twin.readable[namespace].clear()
            self.twin.generation[namespace] += 1

    @rule(client=consumes(clients))
    def die(self, client):
        if client not in self.spaces:
            return
        self.books.connection_lost(client)
        del self.spaces[client]
        for record in (self.held, self.writing):
            for key in [key for key in record if key[0] == client]:
                del record[key]

    @invariant()
    def leased_pages_keep_their_content(self):
        for namespace, pages in self.held.values():
            for page, prefix in pages:
                assert self.twin.content[namespace.page_bytes, page] == (namespace, prefix)

    @invariant()
    def reserved_pages_belong_to_one_writer(self):
        pages = [(w[0].page_bytes, page) for w in self.writing.values() for page in w[4]]
        assert len(pages) == len(set(pages))
        for key in pages:
            assert self.twin.content[key] == "being written"

    @invariant()
    def bytes_in_use_do_not_overlap(self):
        spans = []
        for namespace, held in self.held.values():
            spans += self._spans(namespace, [page for page, _ in held])
        for namespace, _, _, _, pages in self.writing.values():
            spans += self._spans(namespace, pages)
        ordered = sorted(set(spans))
        assert all(end <= start for (_, end), (start, _) in pairwise(ordered))

    @invariant()
    def books_are_sound_and_sums_match(self):
        self.books.check_invariants()
        stats = self._stats()
        assert stats.leases == len(self.held)
        assert stats.reservations == len(self.writing)
        assert stats.pages_writing == sum(len(w[4]) for w in self.writing.values())

    def teardown(self):
        if not hasattr(self, "books"):
            return
        for client in list(self.spaces):
            self.die(client)
        stats = self._stats()
        assert (stats.leases, stats.reservations, stats.pages_writing) == (0, 0, 0)
        for space in stats.namespaces:
            self.books.connect(b"last", space.namespace)
            self.books.flush(b"last")
            self.books.connection_lost(b"last")
        stats = self._stats()
        assert stats.slabs_free == stats.slabs and stats.namespaces == []

    def _spans(self, namespace, pages):
        geometry = self.books._pool.geometry_for(namespace.page_bytes)
        starts = [
            page // geometry.pages_per_slab * geometry.slab_bytes
            + page % geometry.pages_per_slab * geometry.page_bytes
            for page in pages
        ]
        return [(start, start + namespace.page_bytes) for start in starts]

    def _evicted(self):
        return self._stats().total.pages_evicted

    def _stats(self):
        return self.books.stats(epoch="", uptime_s=0, malformed=0, strays=0, refused=0)


TestBooks = BooksMachine.TestCase
TestBooks.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
