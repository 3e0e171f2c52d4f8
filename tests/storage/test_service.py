"""What host memory lost comes back from storage, and whatever goes wrong is a miss."""

import numpy as np
import pytest

from smg_sglang.storage import service as service_module
from smg_sglang.storage.protocol import GetCounters
from smg_sglang.storage.sealed import object_names, object_suffix
from tests.memory.world import eventually, make_namespace, make_path
from tests.storage.world import World

PATH = make_path(*range(1, 100))
LONGER = make_path(*range(1, 150))


def test_pages_that_host_memory_lost_come_back(world):
    client = world.client()
    world.keep(client, PATH)
    world.lose()
    assert world.found(PATH) == []
    fetch = world.fetch(client, LONGER)
    assert (fetch.start, fetch.end) == (0, 99)
    assert world.found(LONGER) == [(7 + i) % 256 for i in range(99)]
    counters = world.counters()
    assert counters.pages["fetched"] == 99 and counters.read_bytes > 99 * 1024


def test_a_fetch_brings_only_what_host_memory_lacks(world):
    client = world.client()
    world.keep(client, PATH)
    world.lose()
    world.compute(make_path(1, 2, 3))
    assert world.fetch(client, PATH, start=3).end == 99
    assert world.counters().pages["fetched"] == 96
    assert len(world.found(PATH)) == 99


def test_nothing_is_leased_or_reserved_afterwards(world):
    client = world.client()
    world.keep(client, PATH)
    world.lose()
    world.fetch(client, PATH)
    eventually(lambda: world.connection.stats(5).leases == 0)
    assert world.connection.stats(5).pages_writing == 0


def test_a_miss_is_told_at_once_and_takes_no_host_memory(world):
    client = world.client(wait_s=600)
    client._word_s = 60  # the box may be busy
    eventually(lambda: client._send(GetCounters(0)))  # it is connected
    assert client.fetch("r", PATH, 0).done
    assert world.connection.stats(5).total.pages_reserved == 0


def test_another_namespace_finds_nothing(world):
    world.keep(world.client(), PATH)
    for other in (
        make_namespace(model="other weights"),
        make_namespace(dtype="fp8"),
        make_namespace(layout="other"),
        make_namespace(page_size=32),
        make_namespace(tp_rank=1, tp_size=2),
    ):
        client = world.client(other)
        assert world.fetch(client, PATH).end == 0


def test_what_was_written_is_not_written_again(world):
    client = world.client()
    world.keep(client, PATH)
    client.offer(PATH)
    world.keep(client, LONGER)
    assert world.written() == 149 and world.backend.calls.count("put") == 3


@pytest.mark.parametrize("where", [0, 500, 1023, 1024, 1040, -1])
def test_a_flipped_bit_is_a_counted_miss(world, where):
    client = world.client()
    world.keep(client, PATH)
    world.lose()
    name = object_names(PATH, object_suffix(world.namespace))[20]
    bad = bytearray(world.backend.objects[name])
    bad[where] ^= 1
    world.backend.objects[name] = bytes(bad)
    assert world.fetch(client, PATH).end == 20
    assert len(world.found(PATH)) == 20
    assert world.counters().pages["corrupt"] == 1
    assert name not in world.backend.objects, "it would be a miss for ever"


def test_a_page_under_anothers_name_is_a_miss(world):
    client = world.client()
    world.keep(client, PATH)
    world.lose()
    names = object_names(PATH, object_suffix(world.namespace))
    world.backend.objects[names[5]] = world.backend.objects[names[6]]
    assert world.fetch(client, PATH).end == 5


def test_a_page_that_host_memory_evicts_first_is_a_counted_drop(world):
    client = world.client()
    client.offer(PATH)  # of which host memory has nothing
    eventually(lambda: client.offer(PATH) or world.counters().pages.get("evicted", 0))
    assert world.written() == 0


def test_a_backend_that_raises_is_a_miss_and_counted(world):
    client = world.client()
    world.keep(client, PATH)
    world.lose()
    world.backend.broken = OSError(5, "Input/output error")
    assert world.fetch(client, PATH).end == 0
    assert world.counters().failures == 1
    world.backend.broken = None
    numbers = iter(range(10_000))
    # After a pause it is asked again.
    eventually(lambda: world.fetch(client, PATH, f"r{next(numbers)}").end == 99)


def test_a_full_backend_is_a_counted_drop(world):
    client = world.client()
    world.compute(PATH)
    world.backend.room = 10
    eventually(lambda: client.offer(PATH) or world.counters().pages.get("refused", 0))
    assert len(world.backend.objects) == 10


def test_a_backend_that_hangs_is_late_and_then_a_miss_at_once(world):
    client = world.client(wait_s=0.05)
    world.keep(client, PATH)
    world.lose()
    world.backend.gate.clear()
    assert world.fetch(client, PATH, "first").end == 0
    assert client.late == 1
    assert client.fetch("second", PATH, 0).done, "nobody waits twice for one silence"
    world.backend.gate.set()
    numbers = iter(range(10_000))
    eventually(lambda: world.fetch(client, PATH, f"r{next(numbers)}").end == 99)


def test_a_read_that_comes_back_late_touches_no_page(monkeypatch):
    monkeypatch.setattr(service_module, "READ_DEADLINE_S", 0.05)
    import shutil
    import tempfile

    from tests.memory.conftest import RunningServer

    directory = tempfile.mkdtemp(prefix="smg-t-")
    world = World(RunningServer(directory))
    try:
        client = world.client()
        world.keep(client, PATH)
        world.lose()
        get = world.backend.get

        def slow(names, into):
            world.backend.gate.clear()
            return get(names, into)

        world.backend.get = slow
        assert world.fetch(client, PATH).end == 0
        world.compute(PATH, byte=100)
        arena = world.connection.arena.buffer.copy()
        world.backend.get = get
        world.backend.gate.set()
        numbers = iter(range(10_000))
        eventually(lambda: world.fetch(client, LONGER, f"r{next(numbers)}", 0).done)
        np.testing.assert_array_equal(arena, world.connection.arena.buffer)
    finally:
        world.close()
        shutil.rmtree(directory, ignore_errors=True)


def test_without_a_storage_process_all_is_a_miss_until_there_is_one(world):
    client = world.client()
    world.keep(client, PATH)
    world.lose()
    world.stop_service()
    eventually(lambda: client.fetch("a", PATH, 0).done)
    world.start_service()
    numbers = iter(range(10_000))
    eventually(lambda: world.fetch(client, PATH, f"r{next(numbers)}").end == 99)


def test_a_storage_process_that_dies_lets_nobody_wait(world):
    client = world.client(wait_s=600)
    world.keep(client, PATH)
    world.lose()
    world.backend.gate.clear()
    assert not client.fetch("r", PATH, 0).done
    world.stop_service()  # with its answer still to come
    assert world.fetch(client, PATH).end == 0
    assert client.late == 0
    world.backend.gate.set()
    world.start_service()


def test_garbage_is_dropped(world):
    import zmq

    from smg_sglang.memory.address import Address
    from smg_sglang.storage.protocol import connect

    dealer = connect(Address.parse(world.running.address))
    dealer.poll(5000, zmq.POLLOUT)
    for garbage in (b"", b"\x00" * 1000, b"\x93\x01\x02"):
        dealer.send(garbage)
    dealer.close(linger=0)
    world.keep(world.client(), PATH)
