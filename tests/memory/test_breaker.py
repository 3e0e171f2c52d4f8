from smg_sglang.memory.breaker import Breaker


class World:
    def __init__(self) -> None:
        self.now = 0.0
        self.breaker = Breaker(lambda: self.now)


def test_one_timeout_is_forgiven_as_soon_as_the_server_is_heard():
    breaker = World().breaker
    breaker.timed_out()
    assert breaker.stalled and not breaker.try_close()
    breaker.heard()
    assert breaker.try_close() and not breaker.stalled


def test_timeouts_in_a_row_lengthen_the_pause():
    world = World()
    pauses = []
    for _ in range(9):
        world.breaker.timed_out()
        world.breaker.heard()
        began = world.now
        while not world.breaker.try_close():
            world.now += 0.05
        pauses.append(round(world.now - began, 2))
    assert pauses[0] == 0
    assert pauses == sorted(pauses)
    assert 4.9 <= pauses[-1] <= 5.1
    world.breaker.answered()
    world.breaker.timed_out()
    world.breaker.heard()
    assert world.breaker.try_close()


def test_pings_are_rare():
    world = World()
    world.breaker.timed_out()
    assert not world.breaker.take_ping()
    world.now += 2.1
    assert world.breaker.take_ping()
    assert not world.breaker.take_ping()
