"""Hints about host memory on a real memory server: at once, or as pages come."""

from smg_sglang.memory.client import MemoryConnection
from smg_sglang.tier.hints import DEMOTE_S, PENDING, HostHints, tenant_of
from tests.memory.conftest import RunningServer
from tests.memory.world import fresh_path, make_namespace

PAGES = 16


class World:
    """Host memory of 16 pages, hints about it, and a clock of theirs."""

    def __init__(self, directory, share=0.5):
        self.server = RunningServer(directory, PAGES * 65536, hint_share=share)
        self.connection = MemoryConnection.open(directory, make_namespace(page_bytes=65536), 5)
        self.here = True
        self.now = 100.0
        self.hints = HostHints(
            lambda: self.connection if self.here else None, 5, clock=lambda: self.now
        )

    def close(self):
        self.connection.close()
        if self.server is not None:
            self.server.stop()

    def write(self, path):
        reservation = self.connection.reserve(path, 5)
        self.connection.publish(reservation)
        self.hints.published(self.connection, path, 5)

    def retained(self):
        return self.connection.stats(5).pages_retained

    def outcomes(self):
        return dict(self.hints.outcomes)


def test_a_prefix_that_is_there_is_retained_at_once(make_world):
    world, path = make_world(), fresh_path(4)
    world.write(path)
    assert world.hints.retain(path, 60, b"") == "met"
    assert world.retained() == 4
    assert world.outcomes() == {"retain met": 1}
    assert len(world.hints) == 0


def test_what_is_still_on_its_way_is_retained_when_it_comes(make_world):
    world, path = make_world(), fresh_path(6)
    world.write(path[:32])
    assert world.hints.retain(path, 60, b"") == PENDING
    assert world.retained() == 2
    world.write(path[:64])
    assert world.outcomes() == {}
    world.write(path)
    assert world.retained() == 6
    assert world.outcomes() == {"retain met": 1}


def test_other_paths_that_come_are_none_of_its_business(make_world):
    world, path = make_world(), fresh_path(3)
    world.hints.retain(path, 60, b"")
    world.write(fresh_path(3))
    assert world.retained() == 0
    assert len(world.hints) == 1


def test_what_never_comes_is_given_up_and_counted(make_world):
    world, path = make_world(), fresh_path(4)
    world.write(path[:16])
    world.hints.retain(path, 60, b"")
    world.hints.retain(fresh_path(2), 10, b"")
    world.now += 10
    world.hints.sweep()
    assert world.outcomes() == {"retain absent": 1}
    world.now += 50
    world.hints.sweep()
    assert world.outcomes() == {"retain absent": 1, "retain partial": 1}


def test_beyond_the_share_of_a_tenant_hints_are_refused_and_counted(make_world):
    world = make_world(share=0.25)
    for salt, expected in (("a", "met"), ("a", "share"), ("b", "met")):
        path = fresh_path(4)
        world.write(path)
        assert world.hints.retain(path, 60, tenant_of(salt)) == expected
    assert world.retained() == 8


def test_a_demoted_prefix_goes_first_even_if_its_end_comes_later(make_world):
    world, going, old = make_world(), fresh_path(4), fresh_path(4)
    world.write(old)
    world.write(going[:32])
    assert world.hints.demote(going) == PENDING
    world.write(going)
    assert world.outcomes() == {"demote met": 1}
    world.write(fresh_path(12))
    assert world.connection.lookup(going, 0, 5) is None
    assert len(world.connection.lookup(old, 0, 5).pages) == 4


def test_the_last_word_counts(make_world):
    world, path = make_world(), fresh_path(4)
    world.hints.retain(path, 60, b"")
    world.hints.demote(path)
    world.write(path)
    assert world.retained() == 0
    assert world.outcomes() == {"retain absent": 1, "demote met": 1}
    longer = path + fresh_path(1)
    world.hints.demote(longer)
    world.hints.retain(longer, 60, b"")
    world.write(longer)
    assert world.retained() == 5
    assert world.hints.retain(longer, 0, b"") == "met"
    assert world.retained() == 0


def test_what_is_demoted_waits_no_longer_than_a_spill_may_take(make_world):
    world = make_world()
    world.hints.demote(fresh_path(1))
    world.now += DEMOTE_S
    world.hints.sweep()
    assert world.outcomes() == {"demote absent": 1}


def test_without_a_memory_server_hints_are_counted(make_world):
    world = make_world()
    world.here = False
    assert world.hints.retain(fresh_path(1), 60, b"") == "unavailable"
    assert world.hints.demote(fresh_path(1)) == "unavailable"
    assert world.hints.retain(fresh_path(1), 0, b"") == "unavailable"
    assert sum(world.outcomes().values()) == 3
    world.here = True
    world.server.stop()
    world.server = None
    assert world.hints.retain(fresh_path(1), 60, b"") == "unavailable"


def test_a_flush_gives_up_what_waits(make_world):
    world = make_world()
    world.hints.retain(fresh_path(1), 60, b"")
    world.hints.clear()
    assert world.outcomes() == {"retain absent": 1}
    assert len(world.hints) == 0


def test_tenants_are_told_apart():
    assert len({tenant_of(salt) for salt in (None, "", "a", "b")}) == 4
