"""Random histories of the books against a naive twin that knows what each page contains."""

from itertools import pairwise
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
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
MOST_CLIENTS = 7
PICKS = st.integers(0, 11)
# Few, and they share prefixes: so that hits, races and evictions happen all the time.
KNOWN_PATHS = [
    make_path(0),
    make_path(0, 0),
    make_path(0, 0, 1, 1),
    make_path(0, 0, 1, 0, 0, 0),
    make_path(0, 1, 1, 1, 1),
    make_path(1, 0, 0),
    make_path(1, 0, 0, 1, 1, 1),
]
PATHS = st.sampled_from(KNOWN_PATHS)
STARTS = st.sampled_from([0, 0, 1, 3])


def prefixes(path: bytes) -> list[bytes]:
    return [path[:end] for end in range(16, len(path) + 1, 16)]


def pick_from(records: dict, pick: int):
    return list(records)[pick % len(records)]


class Twin:
    """Sets of readable prefixes, and what was last written to each page."""

    def __init__(self) -> None:
        self.readable = {namespace: set() for namespace in NAMESPACES}
        self.content: dict[tuple[int, int], object] = {}  # (page_bytes, page) -> prefix
        self.generation = dict.fromkeys(NAMESPACES, 0)


class BooksMachine(RuleBasedStateMachine):
    @initialize(slabs=st.integers(3, 6))
    def start(self, slabs):
        self.books = Books(slabs * 4096, 4096)
        self.twin = Twin()
        self.spaces = {}  # client -> namespace
        self.held = {}  # (client, id) -> (namespace, [(page, prefix)])
        self.writing = {}  # (client, id) -> (namespace, generation, path, have, pages)
        self.ids = iter(range(1 << 30))
        for namespace in (NAMESPACES[0], NAMESPACES[0], *NAMESPACES):
            self.connect(namespace)

    @rule(namespace=st.sampled_from(NAMESPACES))
    def connect(self, namespace):
        if len(self.spaces) < MOST_CLIENTS:
            name = str(next(self.ids)).encode()
            self.books.connect(name, namespace)
            self.spaces[name] = namespace

    @precondition(lambda self: self.spaces)
    @rule(pick=PICKS, path=PATHS, start=STARTS)
    def lookup(self, pick, path, start):
        client, id_ = pick_from(self.spaces, pick), next(self.ids)
        namespace = self.spaces[client]
        pages = self.books.lookup(client, id_, path, start).tolist()
        wanted = prefixes(path)[start : start + len(pages)]
        for page, prefix in zip(pages, wanted, strict=True):
            assert prefix in self.twin.readable[namespace]
            assert self.twin.content[namespace.page_bytes, page] == (namespace, prefix)
        if not self._stats().total.pages_evicted:
            known = [p for p in prefixes(path)[start:] if p in self.twin.readable[namespace]]
            assert len(pages) == len(known)
        if pages:
            self.held[client, id_] = (namespace, list(zip(pages, wanted, strict=True)))

    @precondition(lambda self: self.held)
    @rule(pick=PICKS)
    def release(self, pick):
        lease = pick_from(self.held, pick)
        del self.held[lease]
        self.books.release(*lease)

    @precondition(lambda self: self.spaces)
    @rule(pick=PICKS, path=PATHS)
    def touch(self, pick, path):
        self.books.touch(pick_from(self.spaces, pick), path)

    @precondition(lambda self: self.spaces)
    @rule(pick=PICKS, path=PATHS)
    def reserve(self, pick, path):
        client, id_ = pick_from(self.spaces, pick), next(self.ids)
        namespace = self.spaces[client]
        have, pages = self.books.reserve(client, id_, path)
        assert have + len(pages) <= len(path) // 16
        for page in pages.tolist():
            self.twin.content[namespace.page_bytes, page] = "being written"
        if len(pages):
            generation = self.twin.generation[namespace]
            self.writing[client, id_] = (namespace, generation, path, have, pages.tolist())

    @precondition(lambda self: self.writing)
    @rule(pick=PICKS)
    def publish(self, pick):
        reservation = pick_from(self.writing, pick)
        namespace, generation, path, have, pages = self.writing.pop(reservation)
        written = prefixes(path)[have : have + len(pages)]
        for page, prefix in zip(pages, written, strict=True):
            self.twin.content[namespace.page_bytes, page] = (namespace, prefix)
        self.books.publish(*reservation)
        if generation == self.twin.generation[namespace]:
            self.twin.readable[namespace].update(written)

    @precondition(lambda self: self.spaces)
    @rule(pick=PICKS, path=PATHS)
    def write(self, pick, path):
        before = set(self.writing)
        self.reserve(pick, path)
        for reservation in set(self.writing) - before:
            self.publish(list(self.writing).index(reservation))

    @precondition(lambda self: self.writing)
    @rule(pick=PICKS)
    def abandon(self, pick):
        reservation = pick_from(self.writing, pick)
        del self.writing[reservation]
        self.books.abandon(*reservation)

    @precondition(lambda self: self.spaces)
    @rule(pick=PICKS)
    def flush(self, pick):
        client = pick_from(self.spaces, pick)
        self.books.flush(client)
        self.twin.readable[self.spaces[client]].clear()
        self.twin.generation[self.spaces[client]] += 1

    @precondition(lambda self: self.spaces)
    @rule(pick=PICKS)
    def die(self, pick):
        self._lose(pick_from(self.spaces, pick))

    def _lose(self, client):
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
            self._lose(client)
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

    def _stats(self):
        return self.books.stats(epoch="", uptime_s=0, malformed=0, strays=0, refused=0)


TestBooks = BooksMachine.TestCase
TestBooks.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


# Hypothesis finds the strange history and shrinks it; these make sure of the long, busy ones.
WEIGHTS = {
    "write": 6,
    "lookup": 8,
    "release": 4,
    "reserve": 3,
    "publish": 3,
    "touch": 1,
    "abandon": 1,
    "connect": 2,
    "die": 1,
    "flush": 0.6,
}


@pytest.mark.parametrize("seed", range(12))
def test_a_long_busy_history_keeps_the_books_sound(seed):
    random = Random(seed)
    machine = BooksMachine()
    machine.start(random.randint(3, 8))
    for name in random.choices(list(WEIGHTS), list(WEIGHTS.values()), k=250):
        needs = {"release": machine.held, "publish": machine.writing, "abandon": machine.writing}
        if not needs.get(name, machine.spaces if name != "connect" else True):
            continue
        arguments = {"pick": random.randrange(12)}
        if name in ("write", "lookup", "reserve", "touch"):
            arguments["path"] = random.choice(KNOWN_PATHS)
        if name == "lookup":
            arguments["start"] = random.choice([0, 0, 1, 3])
        if name == "connect":
            arguments = {"namespace": random.choice(NAMESPACES)}
        getattr(machine, name)(**arguments)
        machine.leased_pages_keep_their_content()
        machine.reserved_pages_belong_to_one_writer()
        machine.bytes_in_use_do_not_overlap()
        machine.books_are_sound_and_sums_match()
    total = machine._stats().total
    assert total.hits > 3 and total.pages_evicted > 3 and total.dropped
    machine.teardown()
