"""The simulated host level by itself: what it finds, keeps, and copies when."""

from smg_sglang.simulate.clock import Clock
from smg_sglang.simulate.host import HostLevel, Spill
from smg_sglang.tree.page_keys import page_keys

from .factories import PAGE, make_settings


def path_of(seed: int, pages: int) -> bytes:
    first = seed * 100_000
    return page_keys(range(first, first + pages * PAGE), PAGE)


class World:
    """A host level, and what became of its spills, in the order in which they ended."""

    def __init__(self, **settings) -> None:
        self.clock = Clock()
        self.host = HostLevel(make_settings(**settings), self.clock.now, self.clock.at)
        self.ended: list[tuple[int, bool]] = []

    def spill(self, seed: int, pages: int) -> None:
        def done(whole: bool) -> None:
            self.ended.append((seed, whole))

        self.host.spill(Spill(path_of(seed, pages), pages, done))

    def run(self) -> list[tuple[int, bool]]:
        while self.clock.step():
            pass
        return self.ended

    def found(self, seed: int, pages: int, start: int = 0) -> int:
        lease, found = self.host.find(path_of(seed, pages), start)
        self.host.release(lease)
        return found


def test_what_was_copied_is_found_beyond_what_the_device_has():
    world = World(host_tokens=4096)
    world.spill(1, 8)
    assert world.found(1, 8) == 0, "the copy has not ended"
    world.run()
    assert (world.found(1, 10), world.found(1, 10, start=3), world.found(1, 8, start=8)) == (
        8,
        5,
        0,
    )
    assert world.found(2, 8) == 0


def test_what_is_leased_stays_until_it_is_released():
    world = World(host_tokens=40 * PAGE)
    world.spill(1, 32)
    world.run()
    lease, found = world.host.find(path_of(1, 32), 0)
    assert found == 32
    world.spill(2, 32)
    assert world.run()[-1] == (2, False) and world.found(1, 32) == 32
    world.host.release(lease)
    world.spill(3, 32)
    assert world.run()[-1] == (3, True) and world.found(1, 32) < 32


def test_a_prefix_that_is_hot_on_the_device_does_not_age_in_memory():
    world = World(host_tokens=40 * PAGE)
    world.spill(1, 16)
    world.spill(2, 16)
    world.run()
    world.host.touch(path_of(1, 16))
    world.host.touch(b"")
    world.spill(3, 16)
    world.run()
    assert world.found(1, 16) == 16 and world.found(2, 16) < 16


def test_copies_wait_for_each_other_and_too_many_are_dropped():
    world = World(device_tokens=64 * PAGE, host_tokens=4096)
    for seed in range(1, 6):
        world.spill(seed, 12)
    dropped = world.ended.copy()
    assert dropped and all(not whole for _, whole in dropped)
    assert world.host.dropped["queue_full"] == 12 * len(dropped)
    ended = world.run()[len(dropped) :]
    assert ended == [(seed, True) for seed in range(1, 6 - len(dropped))]
    assert world.clock.now() == world.host.spill_s > 0
