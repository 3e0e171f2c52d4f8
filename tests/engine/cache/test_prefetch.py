"""Loads for requests that wait: a real memory server, SGLang's allocator and Rust tree."""

import random
import threading
import time
from array import array
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from smg_sglang.config import SmgConfig, WritePolicy
from smg_sglang.engine.cache import prefetch
from smg_sglang.tier.host_tier import HostTier
from smg_sglang.transfer.layout import DevicePool
from smg_sglang.transfer.mover import random_delay
from tests.engine.caches import make_cache, namespace_of
from tests.engine.ranks import Ranks
from tests.memory.conftest import RunningServer

PAGE, LAYERS, SLOTS = 4, 2, 256


class World:
    """A worker's cache over a pool whose KV is a function of token and position."""

    def __init__(self, directory, policy=WritePolicy.WRITE_THROUGH, before_copy=None) -> None:
        self.server = RunningServer(directory, 4 << 20)
        self.k = [torch.zeros(SLOTS + PAGE, 1, 2) for _ in range(LAYERS)]
        self.v = [torch.zeros(SLOTS + PAGE, 1, 2) for _ in range(LAYERS)]
        pool = DevicePool.mha(self.k, self.v, PAGE)
        namespace = namespace_of(pool.layout)
        config = SmgConfig(
            memory_address=directory, write_policy=policy, lookup_timeout_ms=5000, prefetch=True
        )
        self.tier = HostTier(config, directory, namespace, pool, before_copy=before_copy)
        assert self.tier.connections._pair.scheduler.wait(5)
        assert self.tier.connections._pair.background.wait(5)
        self.cache = make_cache(SLOTS, PAGE, self.tier)
        self.allocator = self.cache.token_to_kv_pool_allocator
        self.held = 0

    def close(self):
        self.tier.close()
        self.server.stop()

    def compute(self, tokens):
        """What a request does that computes all of its tokens, and ends."""
        slots = self.allocator.alloc(len(tokens))
        if slots is None:
            self.spilled()
            self.cache.evict(EvictParams(num_tokens=len(tokens)))
            slots = self.allocator.alloc(len(tokens))
        for buffer in (*self.k, *self.v):
            buffer[slots] = kv_of(tokens)
        self.cache.insert(InsertParams(key=key(tokens), value=slots.clone()))

    def step(self, *waiting):
        """What the scheduler does in a step in which these go on waiting."""
        self.cache.check_hicache_events()
        self.cache.prefetch_waiting(list(waiting))
        self.check()

    def settle(self, *waiting):
        """Steps until nothing is left to be loaded."""
        for _ in range(100):
            self.step(*waiting)
            if not self.cache.prefetch.tokens_under_way:
                return
            self.wait()
        raise AssertionError("loads without end")

    def wait(self):
        """Until all that is under way has landed."""
        deadline = time.monotonic() + 10
        while not all(map(self.tier.ahead.has_landed, self.tier.ahead.counter.events)):
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def spilled(self):
        """Wait until host memory has all that it was given."""
        self.tier.spills.drain()
        self.cache.check_hicache_events()

    def leave_device(self):
        self.spilled()
        self.cache.evict(EvictParams(num_tokens=SLOTS))

    def on_device(self, tokens):
        """Tokens of the prompt that the device has; their KV must be right."""
        match = self.cache.match_prefix(MatchPrefixParams(key=key(tokens)))
        slots = self.cache.path_device_indices(match.last_device_node).to(torch.int64)
        assert len(slots) == match.device_prefix_len
        for buffer in (*self.k, *self.v):
            assert torch.equal(buffer[slots], kv_of(tokens[: len(slots)]))
        return len(slots)

    def check(self):
        """No slot is lost, as SGLang's own leak check sees it."""
        cache = self.cache
        known = cache.evictable_size() + cache.protected_size() + self.held
        assert self.allocator.available_size() + known == SLOTS


def kv_of(tokens):
    ids = torch.tensor(list(tokens), dtype=torch.float32)
    return torch.stack([ids, torch.arange(len(ids)) + 0.5], dim=1)[:, None]


def key(tokens):
    return RadixKey(array("q", tokens), None)


def request(rid, tokens, **changes):
    fields = {
        "rid": rid,
        "origin_input_ids": array("q", tokens),
        "output_ids": array("q"),
        "_compute_max_prefix_len": lambda length: length - 1,
        "positional_embed_overrides": None,
        "session": None,
        "extra_key": None,
        "cache_salt": None,
        "priority": None,
    }
    return SimpleNamespace(**fields | changes)


pytestmark = pytest.mark.usefixtures("no_disaggregation")


A = list(range(100, 141))  # ten pages and a token
B = A[:20] + list(range(500, 521))


def test_host_pages_of_a_request_that_waits_come_to_the_device(make_world):
    world = make_world()
    world.compute(A[:40])
    world.leave_device()
    assert world.on_device(A) == 0
    world.settle(request("r", A))
    assert world.on_device(A) == 40
    assert world.tier.counters.prefetched_tokens == 40
    assert world.tier.state()["memory"]["leases"] == 0


def test_what_the_device_has_is_not_loaded(make_world):
    world = make_world()
    world.compute(A[:40])
    world.leave_device()
    world.compute(A[:20])
    world.settle(request("r", A))
    assert world.on_device(A) == 40
    assert world.tier.counters.prefetched_tokens == 20


def test_a_long_prefix_comes_in_pieces(make_world):
    world, copies = blocked_world(make_world, [A])
    world.cache.prefetch._piece_pages = 3
    waiting = request("r", A)
    for loaded in (0, 12, 24, 36, 40):
        until(lambda at=loaded: steps_to(world, waiting, at))
        copies.through.release(LAYERS)
    world.step(waiting)
    assert world.tier.state()["memory"]["leases"] == 0


def steps_to(world, waiting, loaded):
    world.step(waiting)
    return world.on_device(A) == loaded


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_the_first_in_the_queue_comes_first(make_world, monkeypatch):
    monkeypatch.setattr(prefetch, "LOOKUPS_A_STEP", 1)
    world = make_world()
    world.compute(A[:40])
    world.compute(B[:40])
    world.leave_device()
    world.step(request("b", B), request("a", A))
    world.wait()
    world.step()
    assert (world.on_device(B), world.on_device(A)) == (40, 20)


def test_a_quarter_of_the_pool_stays_for_others(make_world):
    world = make_world()
    world.compute(A[:40])
    world.leave_device()
    held = world.allocator.alloc(SLOTS * 3 // 4 - 20)
    world.held = len(held)
    world.settle(request("r", A))
    assert world.on_device(A) == 20
    world.allocator.free(held)
    world.held = 0
    world.settle(request("r", A))
    assert world.on_device(A) == 40


def test_no_more_is_loaded_ahead_than_a_quarter_of_the_pool(make_world):
    world = make_world()
    prompts = [list(range(1000 * i, 1000 * i + 41)) for i in range(1, 5)]
    for prompt in prompts:
        world.compute(prompt[:40])
    world.leave_device()
    waiting = [request(f"r{i}", prompt) for i, prompt in enumerate(prompts)]
    world.settle(*waiting)
    assert [world.on_device(prompt) for prompt in prompts] == [40, 24, 0, 0]
    world.settle(*waiting[1:])
    assert [world.on_device(prompt) for prompt in prompts] == [40, 40, 24, 0]


def test_write_back_loads_into_free_slots_only(make_world):
    world = make_world(WritePolicy.WRITE_BACK)
    world.compute(A[:40])
    world.cache.evict(EvictParams(num_tokens=SLOTS))
    world.compute(list(range(5000, 5000 + SLOTS - 20)))
    world.settle(request("r", A))
    assert world.on_device(A) == 20
    assert world.cache.evictable_size() == SLOTS


def test_a_full_pool_makes_room_for_what_is_wanted_next(make_world):
    world = make_world()
    world.compute(A[:40])
    world.leave_device()
    world.compute(list(range(5000, 5000 + SLOTS)))
    world.spilled()
    world.settle(request("r", A))
    assert world.on_device(A) == 40


def test_what_follows_a_head_that_has_left_meanwhile_is_given_back(make_world):
    world = make_world(before_copy=lambda: time.sleep(0.02))
    world.compute(A[:40])
    world.leave_device()
    world.compute(A[:20])
    world.spilled()
    world.step(request("r", A))
    assert world.cache.evict(EvictParams(num_tokens=20)).num_tokens_evicted == 20
    assert world.cache.prefetch.tokens_under_way == 20, "nobody needed its slots"
    world.wait()
    world.step()
    assert world.on_device(A) == 0
    world.check()


def test_what_another_request_computed_meanwhile_stays_and_ours_is_freed(make_world):
    world = make_world(before_copy=lambda: time.sleep(0.02))
    world.compute(A[:40])
    world.leave_device()
    world.step(request("r", A))
    world.compute(A[:32])
    world.wait()
    world.step()
    assert world.on_device(A) == 40
    world.spilled()
    world.check()
    assert world.cache.evictable_size() == 40


def test_of_a_request_that_is_gone_the_pieces_that_have_not_begun_are_given_up(make_world):
    world = make_world(before_copy=lambda: time.sleep(0.05))
    world.compute(A[:40])
    world.leave_device()
    world.cache.prefetch._piece_pages = 3
    world.step(request("r", A))
    assert world.cache.prefetch.tokens_under_way == 40
    time.sleep(0.02)  # the first has begun
    world.step()
    world.wait()
    world.step()
    assert world.on_device(A) == 12
    assert world.cache.prefetch.tokens_under_way == 0
    assert world.tier.state()["memory"]["leases"] == 0


@pytest.mark.parametrize("how", ["drop", "reset"])
def test_kv_that_is_not_wanted_any_more_does_not_come(make_world, how):
    world = make_world(before_copy=lambda: time.sleep(0.02))
    world.compute(A[:40])
    world.leave_device()
    world.step(request("r", A))
    (world.cache.prefetch.drop if how == "drop" else world.cache.reset)()
    world.check()
    world.step()
    assert world.on_device(A) == 0
    assert world.tier.state()["memory"]["leases"] == 0


def test_a_load_that_fails_leaves_a_miss(make_world):
    world = make_world(before_copy=None)
    world.compute(A[:40])
    world.leave_device()

    def fail():
        raise OSError("no such page")

    world.tier.ahead._before_copy = fail
    world.settle(request("r", A))
    assert world.on_device(A) == 0
    world.check()


def test_without_a_memory_server_nothing_is_loaded(make_world):
    world = make_world()
    world.compute(A[:40])
    world.leave_device()
    world.server.stop()
    world.settle(request("r", A))
    assert world.on_device(A) == 0
    world.server = RunningServer(world.tier.connections.address, 4 << 20)


def test_making_room_does_not_evict_the_head_that_is_extended(make_world):
    world = make_world()
    prompt = list(range(1000, 1000 + SLOTS + 1))
    world.compute(prompt[:SLOTS])
    world.leave_device()
    world.compute(prompt[:192])
    world.spilled()
    held = world.allocator.alloc(SLOTS - 192)
    world.held = len(held)
    world.settle(request("r", prompt))
    assert world.on_device(prompt) == 192


def test_what_one_has_on_the_device_is_not_evicted_for_another(make_world):
    world = make_world()
    first, second = (list(range(i, i + 97)) for i in (1000, 2000))
    for prompt in (first, second):
        world.compute(prompt[:96])
        world.spilled()
    world.leave_device()
    for prompt in (first, second):
        world.compute(prompt[:80])
    world.spilled()
    world.compute(list(range(5000, 5096)))
    world.spilled()
    world.settle(request("a", first), request("b", second))
    assert (world.on_device(first), world.on_device(second)) == (96, 96)


class Blocked:
    """A hook that lets copies through by number."""

    def __init__(self):
        self.through = threading.Semaphore(1000)

    def __call__(self):
        self.through.acquire(timeout=10)

    def close(self):
        while self.through.acquire(blocking=False):
            pass

    def open(self):
        self.through.release(1000)


def blocked_world(make_world, prompts):
    """All prompts are in host memory; loads wait until `open`."""
    copies = Blocked()
    world = make_world(before_copy=copies)
    for prompt in prompts:
        world.compute(prompt[: len(prompt) // PAGE * PAGE])
        world.spilled()
    world.leave_device()
    copies.close()
    return world, copies


def test_pieces_of_requests_that_left_still_count(make_world):
    prompts = [list(range(i, i + 41)) for i in range(1000, 7000, 1000)]
    world, copies = blocked_world(make_world, prompts)
    for i, prompt in enumerate(prompts):
        world.step(request(f"r{i}", prompt))
        assert world.cache.prefetch.tokens_under_way <= SLOTS // 4
    copies.open()
    world.wait()
    world.step()


def test_slots_under_way_are_there_for_those_who_need_them_now(make_world):
    world, copies = blocked_world(make_world, [A])
    world.cache.prefetch._piece_pages = 3
    world.step(request("r", A))
    assert world.allocator.available_size() == SLOTS - 40
    assert world.cache.evictable_size() == 40, "so that requests are admitted"
    copies.open()
    assert world.cache.evict(EvictParams(num_tokens=SLOTS)).num_tokens_evicted == 40
    assert world.allocator.available_size() == SLOTS
    assert world.tier.state()["memory"]["leases"] == 0
    world.check()


def test_requests_with_the_same_prefix_load_it_once(make_world):
    world, copies = blocked_world(make_world, [A])
    waiting = [request(f"r{i}", A) for i in range(4)]
    world.step(*waiting)
    assert world.cache.prefetch.tokens_under_way == 40
    copies.open()
    world.settle(*waiting)
    assert world.tier.counters.prefetched_tokens == 40


def test_one_that_was_only_overtaken_keeps_its_pieces(make_world, monkeypatch):
    monkeypatch.setattr(prefetch, "LOOK_AHEAD", 1)
    world, copies = blocked_world(make_world, [A])
    overtaken = request("r", A)
    world.step(overtaken)
    world.step(request("first", list(range(9000, 9010))), overtaken)
    copies.open()
    world.wait()
    world.step()
    assert world.on_device(A) == 40


def test_a_memory_server_that_is_late_is_asked_again(make_world):
    world = make_world()
    world.compute(A[:40])
    world.leave_device()
    waiting, connection = request("r", A), type(world.tier.connections._pair.scheduler.connection())
    stalled = connection.stalled
    try:
        connection.stalled = property(lambda self: True)
        world.settle(waiting)
    finally:
        connection.stalled = stalled
    assert world.on_device(A) == 0
    world.settle(waiting)
    assert world.on_device(A) == 40


@pytest.mark.parametrize("piece_pages", [3, 100])
def test_a_load_that_is_refused_costs_no_slot_and_no_lease(make_world, piece_pages):
    world = make_world()
    world.compute(A[:40])
    world.leave_device()
    world.cache.prefetch._piece_pages = piece_pages
    queue, calls = world.tier.ahead.queue, []

    def refuse(*args):
        calls.append(args)
        if len(calls) == (2 if piece_pages == 3 else 1):
            raise ValueError("pages outside the arena")
        queue(*args)

    world.tier.ahead.queue = refuse
    world.settle(request("r", A))
    world.check()
    assert world.on_device(A) == (12 if piece_pages == 3 else 0)
    assert world.tier.state()["memory"]["leases"] == 0


def test_a_small_part_of_what_is_needed_is_not_worth_a_load(make_world):
    world = make_world()
    world.compute(A[:40])
    world.leave_device()
    held = world.allocator.alloc(SLOTS * 3 // 4 - 8)
    world.held = len(held)
    world.settle(request("r", A))
    assert world.on_device(A) == 0


@pytest.mark.parametrize(
    "changes",
    [{"session": object()}, {"positional_embed_overrides": object()}, {"cache_salt": "tenant"}],
)
def test_what_cannot_be_found_in_the_tree_is_left_alone(make_world, changes):
    world = make_world()
    world.compute(A[:40])
    world.leave_device()
    world.settle(request("r", A, **changes))
    assert world.on_device(A) == 0


def test_a_request_that_waits_is_asked_about_once(make_world):
    world = make_world()
    waiting = request("r", A)
    for _ in range(5):
        world.settle(waiting)
    assert world.tier.counters.lookups["miss"] == 1


def test_only_the_next_ones_are_looked_after(make_world, monkeypatch):
    monkeypatch.setattr(prefetch, "LOOK_AHEAD", 1)
    world = make_world()
    world.compute(A[:40])
    world.leave_device()
    world.settle(request("first", list(range(9000, 9010))), request("r", A))
    assert world.on_device(A) == 0


def ranks_of(*worlds) -> Ranks:
    ranks = Ranks(worlds)
    for rank, world in enumerate(worlds):
        world.cache.prefetch._piece_pages = 3
        ranks.join(rank, world.cache)
    return ranks


PROMPTS = [A, B, *(list(range(1000 * i, 1000 * i + 33)) for i in range(1, 8))]


def live(ranks, steps, seed=5):
    """So many steps with requests that come, wait and go, and with all that takes their memory."""
    rng = random.Random(seed)
    queue = []
    for step in range(steps):
        match rng.randrange(7):
            case 0 if len(queue) < 6:
                queue.append((f"r{step}", rng.choice(PROMPTS)))
            case 1 if queue:
                queue.pop(rng.randrange(len(queue)))
            case 2:
                tokens = rng.choice(PROMPTS)
                ranks.all(World.compute, tokens[: len(tokens) - 1])
            case 3:
                ranks.all(evict, rng.randrange(SLOTS))
            case 4:
                ranks.all(World.on_device, rng.choice(PROMPTS))
                ranks.all(World.on_device, rng.choice(PROMPTS))
            case 5 if rng.random() < 0.1:
                ranks.all(lambda world: world.cache.prefetch.drop())
            case 6:
                time.sleep(0.001)
        ranks.all(lambda world: world.step(*(request(*each) for each in queue)))
        ranks.all(lambda world: world.cache.prefetch.tokens_under_way)
    ranks.all(World.spilled)
    ranks.all(World.settle)
    for prompt in PROMPTS:
        ranks.all(World.on_device, prompt)


def evict(world, tokens):
    return world.cache.evict(EvictParams(num_tokens=tokens)).num_tokens_evicted


def is_free_in_the_end(world):
    world.compute(A[:40])  # chance may have left the tree empty
    world.spilled()
    assert evict(world, SLOTS) > 0
    return world.allocator.available_size() == SLOTS


def test_whatever_happens_in_whatever_order_no_slot_is_lost_and_kv_is_right(make_world):
    world = make_world(before_copy=random_delay(0.002))
    with ranks_of(world) as ranks:
        live(ranks, 1500)
        assert world.tier.counters.prefetched_tokens > 1000
        assert ranks.all(is_free_in_the_end)


def test_ranks_have_the_same_tree_after_each_step(make_world):
    """Where one is slow, fails to copy some pages or refuses to, and cannot ask its memory for a
    while."""
    fast = make_world()
    slow = make_world(before_copy=sometimes(random_delay(0.004), fail=0.02))
    with ranks_of(fast, slow) as ranks:
        live(ranks, 400)
        slow.tier.lookups._timeout_s = 0  # its memory is never in time
        live(ranks, 100, seed=6)
        slow.tier.lookups._timeout_s = 0.5
        slow.tier.ahead.queue = sometimes_refused(slow.tier.ahead.queue, 0.1)
        live(ranks, 400, seed=7)
        assert ranks.all(lambda world: world.tier.counters.prefetched_tokens) > 300
        assert ranks.all(is_free_in_the_end)
    for world in (fast, slow):
        assert world.tier.state()["memory"]["leases"] == 0


def sometimes(delay, fail):
    rng = random.Random(8)

    def before_copy():
        delay()
        if rng.random() < fail:
            raise OSError("no such page")

    return before_copy


def sometimes_refused(queue, share):
    rng = random.Random(9)

    def refuse(*args):
        if rng.random() < share:
            raise ValueError("pages outside the arena")
        queue(*args)

    return refuse
