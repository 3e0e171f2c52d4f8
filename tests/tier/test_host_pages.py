"""Pages held in host memory while a request attends them there."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from smg_sglang.engine.streams.limits import Limits
from smg_sglang.errors import MemoryUnavailable
from smg_sglang.tier import host_pages
from smg_sglang.tier.ranks import Ranks
from tests.tier.test_host_tier import (
    LAYERS,
    PAGE,
    World,  # noqa: F401  # what `make_world` makes
    leases,
    path_of,
    slots_at,
    until,
)


def bytes_of(held, world):
    """The held pages' KV, as `World.read` gives it for slots: [2 * layers, tokens, heads, dim]."""
    layout = world.tier.layout
    pages = []
    for part in held:
        for offset in part.run.offsets:
            raw = part.run.arena[offset : offset + layout.page_bytes]
            page = torch.from_numpy(raw.copy()).view(torch.float32)
            pages.append(page.view(LAYERS, 2, PAGE, 2, 8))
    whole = torch.cat(pages, 2)
    return torch.cat([whole[:, 0], whole[:, 1]])


def fill(world):
    """Twice what the server holds."""
    for seed in range(2, 30):
        world.spill(seed, 200, slots_at(50, 200))


def test_what_is_kept_is_there_and_found_by_others(make_world):
    world = make_world()
    slots = slots_at(0, 40)
    world.write(1, slots)
    held = world.tier.pages.keep(path_of(1, 40), 0, slots)
    assert all(part.lease is not None for part in held), "memory of our own nobody else finds"
    assert torch.equal(bytes_of(held, world), world.read(slots))
    found = world.tier.pages.find(path_of(1, 40))
    assert torch.equal(bytes_of(found, world), world.read(slots))
    world.tier.pages.release(held)
    world.tier.pages.release(found)
    assert world.tier.pages.num_held == 0 and held == []


def test_a_context_grows_chunk_by_chunk(make_world):
    world = make_world()
    slots = slots_at(0, 40)
    world.write(1, slots)
    path = path_of(1, 40)
    held = world.tier.pages.keep(path[: 16 * 4], 0, slots[:16])
    held += world.tier.pages.keep(path, 4, slots[16:])
    assert torch.equal(bytes_of(held, world), world.read(slots))


def test_held_pages_are_not_evicted(make_world):
    world = make_world()
    slots = slots_at(0, 40)
    world.write(1, slots)
    before = world.read(slots)
    held = world.tier.pages.keep(path_of(1, 40), 0, slots)
    fill(world)
    assert torch.equal(bytes_of(held, world), before)


def test_the_first_pages_stay_held_where_the_others_are_let_go(make_world):
    world = make_world()
    slots = slots_at(0, 40)
    world.write(1, slots)
    before = world.read(slots[: 6 * PAGE])
    pages = world.tier.pages
    held = pages.first(pages.keep(path_of(1, 40), 0, slots), 6)
    fill(world)
    assert torch.equal(bytes_of(held, world), before)
    own = [*held, pages._own(slots), pages._own(slots)]
    assert [part.num_pages for part in pages.first(own, 8)] == [6, 2]
    assert pages.num_held == 2
    assert pages.first(pages.find(path_of(1, 40)), 0) == []
    assert pages.num_held == 2


@pytest.mark.parametrize("alike", [False, True])
def test_ranks_that_look_at_the_same_moment_leave_a_gigabyte_together(
    make_world, monkeypatch, alike
):
    world = make_world(ranks=Ranks(size=8, alike=alike))
    slots, pages = slots_at(0, 40), world.tier.pages
    wanted = 8 * len(slots) // PAGE * world.tier.layout.page_bytes
    for available, fits in ((wanted - 1, False), (wanted, True)):
        box = SimpleNamespace(available=available + host_pages.SPARE_BYTES)
        monkeypatch.setattr(host_pages, "box_memory", lambda box=box: box)
        if fits:
            pages._own(slots)
        else:
            with pytest.raises(MemoryUnavailable, match="no room for 40 tokens"):
                pages._own(slots)


def test_memory_that_the_system_does_not_give_is_none(make_world, monkeypatch):
    world = make_world()

    def refuse(*args):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(host_pages.mmap, "mmap", refuse)
    with pytest.raises(MemoryUnavailable, match="could not be copied"):
        world.tier.pages.keep(path_of(1, 40), 0, slots_at(0, 40), shared=False)
    assert world.tier.pages.num_held == 0


def test_full_memory_leaves_the_rest_with_the_worker(make_world):
    world = make_world()
    others = [
        part
        for seed in range(2, 14)
        for part in world.tier.pages.keep(path_of(seed, 240), 0, slots_at(0, 240))
    ]
    slots = slots_at(0, 200)
    world.write(1, slots)
    held = world.tier.pages.keep(path_of(1, 200), 0, slots)
    assert held[-1].lease is None
    assert torch.equal(bytes_of(held, world), world.read(slots))
    world.tier.pages.release(others)


def test_a_server_that_dies_takes_nothing_along(make_world):
    world = make_world()
    slots = slots_at(0, 80)
    world.write(1, slots)
    path = path_of(1, 80)
    held = world.tier.pages.keep(path[: 16 * 5], 0, slots[:20])
    world.restart()
    away, world.tier.pages._connection = world.tier.pages._connection, lambda: None
    held += world.tier.pages.keep(path[: 16 * 10], 5, slots[20:40])
    world.tier.pages._connection = away
    assert held[-1].lease is None
    # The new server lacks what came before: these cannot be published there.
    held += world.tier.pages.keep(path, 10, slots[40:])
    assert torch.equal(bytes_of(held, world), world.read(slots))
    world.tier.pages.release(held)


def test_a_lookup_without_an_answer_finds_nothing(make_world, monkeypatch):
    world = make_world()
    slots = slots_at(0, 40)
    world.write(1, slots)
    pages = world.tier.pages
    pages.release(pages.keep(path_of(1, 40), 0, slots))

    def late(*args):
        raise MemoryUnavailable("no answer in 200 ms")

    monkeypatch.setattr(world.tier.connections._pair.scheduler.connection(), "lookup", late)
    assert pages.find(path_of(1, 40)) == [] and pages.num_held == 0
    held = pages.keep(path_of(1, 40), 0, slots)
    assert [part.lease for part in held] == [None]
    assert torch.equal(bytes_of(held, world), world.read(slots))


def test_a_box_without_room_is_said_and_nothing_is_held(make_world, monkeypatch):
    world = make_world()
    monkeypatch.setattr(host_pages, "SPARE_BYTES", 1 << 60)
    monkeypatch.setattr(world.tier.pages, "_connection", lambda: None)
    with pytest.raises(MemoryUnavailable, match="no room for 40 tokens"):
        world.tier.pages.keep(path_of(1, 40), 0, slots_at(0, 40))
    assert world.tier.pages.num_held == 0


def test_a_copy_that_fails_leaves_the_pages_with_the_worker(make_world, monkeypatch):
    world = make_world()
    slots = slots_at(0, 40)
    world.write(1, slots)
    spill, calls = world.tier.pages._mover.spill, []

    def fail_once(move, after=()):
        calls.append(move)
        if len(calls) == 1:
            raise RuntimeError("no such page")
        spill(move, after)

    monkeypatch.setattr(world.tier.pages._mover, "spill", fail_once)
    held = world.tier.pages.keep(path_of(1, 40), 0, slots)
    assert [part.lease for part in held] == [None]
    assert torch.equal(bytes_of(held, world), world.read(slots))
    assert world.tier.pages.counters.pages == 10, "what failed is not counted"
    assert world.tier.pages.find(path_of(1, 40)) == [], "half-written pages are nobody's"


def test_new_weights_leave_held_pages_alone(make_world):
    world = make_world()
    slots = slots_at(0, 40)
    world.write(1, slots)
    before = world.read(slots)
    held = world.tier.pages.keep(path_of(1, 40), 0, slots)
    world.tier.weights_changed("new")
    world.connected()
    assert world.tier.pages.find(path_of(1, 40)) == []
    fill(world)
    assert torch.equal(bytes_of(held, world), before)
    world.tier.pages.release(held)
    assert world.tier.host_tokens() > 0
    assert world.tier.connections._retired == []


def test_connections_from_before_new_weights_stay_while_their_pages_are_held(make_world):
    def connections():
        return world.tier.state()["memory"]["connections"]

    world = make_world()
    slots = slots_at(0, 40)
    held = world.tier.pages.keep(path_of(1, 40), 0, slots)
    world.tier.weights_changed("new")
    world.connected()
    world.tier.host_tokens()
    assert connections() == 4 and leases(world) == 1
    world.tier.pages.release(held)
    until(lambda: leases(world) == 0)
    world.tier.host_tokens()
    until(lambda: connections() == 2)
    world.tier.weights_changed("newer")
    world.connected()
    until(lambda: connections() == 2)


def test_what_is_not_shared_is_found_by_nobody(make_world):
    world = make_world()
    slots = slots_at(0, 40)
    world.write(1, slots)
    held = world.tier.pages.keep(path_of(1, 40), 0, slots, shared=False)
    assert [part.lease for part in held] == [None]
    assert torch.equal(bytes_of(held, world), world.read(slots))
    assert world.tier.pages.find(path_of(1, 40)) == []


def test_memory_of_a_dead_server_is_unpinned_once_nothing_reads_it(make_world, monkeypatch):
    """On a CPU nothing is pinned, so only the request to unpin can be seen."""
    world = make_world()
    unpinned = []
    monkeypatch.setattr(world.tier._mover, "unpin", unpinned.append)
    world.spill(1, 40, slots_at(0, 40))
    path = path_of(1, 40)
    held = world.tier.pages.find(path)
    assert world.tier.lookups.find("r", path, 0) == 10 and world.tier.load_backs.load(
        "r", slots_at(100, 40)
    )
    former = held[0].run.arena

    def after_a_lookup():
        assert world.tier.pages.find(path) == []
        return [arena is former for arena in unpinned]

    world.restart()
    assert after_a_lookup() == []
    world.tier.pages.release(held)
    assert after_a_lookup() == []
    index = world.tier.load_backs.start()
    assert after_a_lookup() == []
    world.tier.load_backs.finish(index)
    after_a_lookup()
    assert after_a_lookup() == [True]


def test_what_host_memory_could_hold_is_known(make_world):
    world = make_world(host_bytes=1 << 20)
    tokens = world.tier.host_tokens()
    assert 0.9 * (1 << 20) < tokens / PAGE * world.tier.layout.page_bytes <= 1 << 20
    # Each of two ranks has a shard of every token there, unless all have the same.
    for alike, times in ((False, 2), (True, 1)):
        world = make_world(host_bytes=1 << 20, ranks=Ranks(size=2, alike=alike))
        assert world.tier.host_tokens() == tokens // times


@pytest.mark.parametrize("page", [1, 16, 128])
def test_limits_are_whole_pages_and_leave_room_for_others(page):
    limits = Limits(device=2048, page=page)
    assert limits.chunk % page == 0 and limits.chunk <= 1024
    assert limits.tail % page == 0 and page <= limits.tail <= max(page, 128)
    assert not limits.needs_stream(1000, 100_000)
    assert limits.needs_stream(2048, 1)
    # An answer that may be long makes a stream only where the prompt leaves it little room.
    assert limits.needs_stream(2048 - 256, 100_000) and not limits.needs_stream(1536, 100_000)


def test_a_request_that_is_no_stream_fits_the_device():
    rng = np.random.default_rng(0)
    for _ in range(300):
        page = int(rng.choice([1, 16, 128]))
        limits = Limits(int(rng.integers(4, 200)) * 128, page)
        tokens, new = int(rng.integers(1, 30_000)), int(rng.integers(0, 30_000))
        if not limits.needs_stream(tokens, new):
            # SGLang clips its answer to this, and it is something.
            left = limits.device - limits.paged(tokens) - page - 1
            assert left >= min(new, limits.device // 8)
