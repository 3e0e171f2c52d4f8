"""How SGLang's own cache and Rust tree core behave on a CPU where our cache subclass relies on it.

When one of these fails with a new SGLang, the failure says which of our files depends on what
changed.
"""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.mem_cache.base_prefix_cache import (
    CacheRequestHandle,
    EvictParams,
    InsertParams,
    MatchPrefixParams,
)
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinkerWrapper

from smg_sglang.config import WritePolicy
from smg_sglang.tree.page_keys import keys_from_hex
from tests.engine.caches import make_cache
from tests.engine.contract import needed_by
from tests.engine.ranks import Ranks
from tests.engine.streams.test_table import Table

PAGE = 16


class Tier:
    """The host tier as far as the cache talks to it; remembers what it is told."""

    def __init__(self, policy) -> None:
        self.config = SimpleNamespace(write_policy=policy, stream_context=False)
        self.ahead = self.stored = None
        self.trails = []
        # One object stands for all parts of a tier.
        self.lookups = self.spills = self.queue = self
        self.hints = SimpleNamespace(sweep=lambda: None, clear=lambda: None)
        self.load_backs = SimpleNamespace(loads=SimpleNamespace(counter=None))
        self.spilled = []
        self.spilled_now = []
        self.host_pages = 0
        self.completed = []
        self.forgotten = []

    def submit(self, path, slots, own_slots, ready, ends):
        assert ready == () and ends == {}
        self.spilled.append((path, slots.tolist(), own_slots))

    def spill_now(self, path, slots):
        self.spilled_now.append((path, slots.tolist()))

    def find(self, rid, path, start):
        self.asked = (rid, path, start)
        return self.host_pages

    def touch(self, rid, path):
        """A hit on the device."""

    def forget(self, rid):
        self.forgotten.append(rid)

    def num_completed(self):
        return len(self.completed)

    def pop_completed(self):
        return self.completed.pop(0)


class World:
    """A `SmgRadixCache` over SGLang's allocator; `tokens` are a request's, `slots` its KV."""

    def __init__(self, policy=WritePolicy.WRITE_THROUGH) -> None:
        self.tier = Tier(policy)
        self.cache = make_cache(1024, PAGE, self.tier)
        self.allocator = self.cache.token_to_kv_pool_allocator
        self.core = self.cache.tree_core

    def insert(self, tokens, extra_key=None, salt=None):
        """Insert as a request does that computed all of its tokens; its slots."""
        slots = self.allocator.alloc(len(tokens))
        self.cache.insert(InsertParams(key=key(tokens, extra_key, salt), value=slots.clone()))
        return slots.tolist()

    def match(self, tokens, extra_key=None, salt=None, rid=None):
        req = None if rid is None else SimpleNamespace(rid=rid, session=None)
        return self.cache.match_prefix(MatchPrefixParams(key=key(tokens, extra_key, salt), req=req))


def key(tokens, extra_key=None, salt=None):
    return RadixKey(array("q", tokens), extra_key, cache_salt=salt)


def hex_path(tokens, extra_key=None, salt=None):
    """SGLang's page hashes of a whole prompt, not by way of a tree."""
    from sglang.srt.mem_cache.utils import get_storage_hash_str

    return get_storage_hash_str(key(tokens, extra_key, salt), None, page_size=PAGE)


pytestmark = pytest.mark.usefixtures("no_disaggregation")


A = list(range(100, 164))
B = A[:32] + list(range(500, 532))


@needed_by("engine/cache/linker_wrapper.py (write_through_threshold)")
@pytest.mark.parametrize(
    ("policy", "spills_after_each_insert"),
    [
        (WritePolicy.WRITE_THROUGH, [1, 1, 2]),
        (WritePolicy.SELECTIVE, [0, 1, 1]),
        (WritePolicy.WRITE_BACK, [0, 0, 0]),
    ],
)
def test_the_core_asks_for_a_spill_at_the_first_second_or_no_insertion(
    policy, spills_after_each_insert
):
    world = World(policy)
    seen = []
    for tokens in (A, A, A + list(range(16))):
        world.insert(tokens)
        seen.append(len(world.tier.spilled))
    assert seen == spills_after_each_insert


@needed_by("engine/cache/linker_wrapper.py (write_through_threshold)")
@pytest.mark.parametrize("threshold", [1, 2, 1 << 30])
def test_the_core_takes_the_threshold_as_it_is(threshold):
    world = World()
    world.cache.write_through_threshold = threshold
    assert world.core.write_through_threshold == threshold
    assert world.core.enable_external_cache_linker


@needed_by("engine/cache/linker_wrapper.py (_path)")
@pytest.mark.parametrize(("extra_key", "salt"), [(None, None), ("lora", None), (None, "tenant")])
def test_hashes_of_a_path_are_the_hashes_of_the_prompt(extra_key, salt):
    world = World()
    world.insert(A, extra_key, salt)
    world.insert(B, extra_key, salt)
    leaf = world.match(B, extra_key, salt).last_device_node
    whole = hex_path(B, extra_key, salt)
    assert world.core.get_prefix_hash_values(leaf) == whole[:2], "the node itself is not included"
    assert world.core.get_hash_values(leaf) == whole[2:]
    assert world.cache.linker._path(leaf) == keys_from_hex(whole)


@needed_by("engine/cache/linker_wrapper.py (page keys are tenant-safe)")
def test_hashes_differ_by_adapter_and_tenant():
    paths = {tuple(hex_path(A, *space)) for space in ((), ("lora",), (None, "a"), (None, "b"))}
    assert len(paths) == 4


@needed_by("engine/cache/linker_wrapper.py (_path_slots)")
@pytest.mark.parametrize(("extra_key", "salt"), [(None, None), ("lora", None), (None, "tenant")])
def test_slots_of_a_path_come_in_the_order_of_the_tokens(extra_key, salt):
    world = World()
    first = world.insert(A, extra_key, salt)
    second = world.insert(B, extra_key, salt)
    leaf = world.match(B, extra_key, salt).last_device_node
    assert world.core.prefetch_anchor_info(leaf) == (extra_key, salt)
    assert world.cache.linker._path_slots(leaf).tolist() == first[:32] + second[32:]


@needed_by("engine/cache/linker_wrapper.py (_offload_node)")
def test_a_spill_names_the_whole_path_and_how_much_of_it_is_new():
    world = World()
    first = world.insert(A)
    second = world.insert(B)
    assert world.tier.spilled[0] == (keys_from_hex(hex_path(A)), first, len(A))
    assert world.tier.spilled[-1] == (keys_from_hex(hex_path(B)), first[:32] + second[32:], 32)


@needed_by("engine/cache/linker_wrapper.py (_offload_node)")
def test_a_node_stays_on_the_device_until_its_spill_has_ended():
    world = World()
    world.insert(A)
    assert world.cache.evict(EvictParams(num_tokens=len(A))).num_tokens_evicted == 0
    world.tier.completed.append(True)
    world.cache.check_hicache_events()
    assert world.cache.linker.pending_offloads == []
    assert world.cache.evict(EvictParams(num_tokens=len(A))).num_tokens_evicted == len(A)


@needed_by("engine/cache/linker_wrapper.py (_offload_node)")
@pytest.mark.parametrize(("landed", "spills"), [(True, 1), (False, 2)])
def test_only_a_spill_that_failed_is_asked_for_again(landed, spills):
    world = World()
    world.insert(A)
    world.tier.completed.append(landed)
    world.cache.check_hicache_events()
    world.insert(A)
    assert len(world.tier.spilled) == spills


@needed_by("engine/cache/linker_wrapper.py (_pending)")
def test_a_node_split_during_its_spill_is_released_whole():
    world = World()
    world.insert(A)
    world.insert(B)
    world.tier.completed += [True] * len(world.cache.linker.pending_offloads)
    world.cache.check_hicache_events()
    evictable = world.cache.evictable_size()
    assert evictable == len(set(A) | set(B))
    assert world.cache.evict(EvictParams(num_tokens=evictable)).num_tokens_evicted == evictable


@needed_by("engine/cache/radix_cache.py (_evict_device_leaf)")
def test_a_leaf_passes_through_our_hands_before_its_slots_are_freed():
    world = World(WritePolicy.WRITE_BACK)
    slots = world.insert(A)
    free = world.allocator.available_size()
    spill_now = world.tier.spills.spill_now
    seen = []
    world.tier.spills.spill_now = lambda *args: (
        seen.append(world.allocator.available_size()),
        spill_now(*args),
    )
    world.cache.evict(EvictParams(num_tokens=PAGE))
    assert world.tier.spilled_now == [(keys_from_hex(hex_path(A)), slots)]
    assert seen == [free]
    assert world.allocator.available_size() == free + len(A)


@needed_by("engine/cache/linker_wrapper.py (match)")
@pytest.mark.parametrize(("known", "extra_key"), [([], None), (A[:32], None), (A[:32], "lora")])
def test_a_match_is_extended_by_the_pages_behind_it(known, extra_key):
    world = World()
    if known:
        world.insert(known, extra_key)
    world.tier.host_pages = 1
    result = world.match(A, extra_key, rid="r")
    path = keys_from_hex(hex_path(A, extra_key))
    assert world.tier.asked == ("r", path, len(known) // PAGE)
    assert (result.device_prefix_len, result.host_hit_length) == (len(known), PAGE)
    assert result.last_host_node == result.best_match_node
    assert world.cache.linker.has_hit("r")


@needed_by("engine/cache/radix_cache.py (finish_external_linker_loads)")
def test_a_prompt_that_cannot_leave_the_device_is_dropped_with_the_reason():
    """SGLang drops the output of what it is given here, and says the reason to the client."""
    cache = World().cache
    table = cache.streams = Table(on_cuda=False)
    stream = table.begin("long", 1)
    req, other = stream.req, SimpleNamespace(rid="short")
    req.output_ids = []
    assert cache.finish_external_linker_loads([req, other]) == []
    stream.failure = "host memory has no room"
    assert cache.finish_external_linker_loads([req, other]) == [req]
    assert req.discard_output_reason.to_json()["message"] == "host memory has no room"
    assert req.discard_output_reason.to_json()["status_code"] == 503
    assert req.skip_radix_cache_insert, "or its release would try to copy it once more"


@needed_by("engine/cache/radix_cache.py (finish_external_linker_loads)")
def test_a_stream_that_generates_ends_where_it_asks_for_room():
    cache = World().cache
    table = cache.streams = Table(on_cuda=False)
    stream = table.begin("long", 1)
    stream.req.output_ids, stream.failure = [1], "host memory has no room"
    assert cache.finish_external_linker_loads([stream.req]) == []


@needed_by("engine/cache/linker_wrapper.py (release_request)")
def test_a_request_that_is_given_up_is_forgotten():
    world = World()
    world.tier.host_pages = 1
    world.match(A, rid="r")
    world.cache.release_aborted_request(CacheRequestHandle("r", 0))
    assert world.tier.forgotten == ["r"]
    assert not world.cache.linker.has_hit("r")


@needed_by("engine/cache/linker_wrapper.py (spill_retracted)")
@pytest.mark.parametrize(("extra_key", "salt"), [(None, None), ("lora", None), (None, "tenant")])
def test_a_retracted_request_is_spilled_under_the_keys_it_will_look_for(extra_key, salt):
    world = World()
    slots = world.allocator.alloc(len(A))
    world.cache.req_to_token_pool = SimpleNamespace(req_to_token=slots.to(torch.int32)[None])
    world.cache.before_retraction(
        SimpleNamespace(
            rid="r",
            kv=SimpleNamespace(holds_kv=True, req_pool_idx=0),
            finished=lambda: False,
            refresh_fill_ids=lambda: None,
            owned_kv_len=lambda: len(A),
            full_untruncated_fill_ids=array("q", A),
            skip_radix_cache_insert=False,
            extra_key=extra_key,
            cache_salt=salt,
        )
    )
    kept = len(A) - PAGE  # the newest token may be on its way
    keys = keys_from_hex(hex_path(A[:kept], extra_key, salt))
    assert world.tier.spilled_now == [(keys, slots.tolist()[:kept])]
    world.match(A, extra_key, salt, rid="r")
    assert world.tier.asked[1].startswith(keys)


# ---- what SGLang's scheduler asks for or says beside requests ----


def with_parts(world, *names):
    told = []

    def part(name):
        return SimpleNamespace(
            state=lambda: {name: 1},
            drop=lambda: told.append(name),
            weights_changed=lambda *names: told.append(name),
        )

    for name in names:
        setattr(world.cache, name, part(name))
    world.tier.state = part("tier").state
    world.tier.weights_changed = part("tier").weights_changed
    return told


def test_new_weights_are_told_to_loads_ahead_then_to_the_tier_and_to_streams():
    world = World()
    told = with_parts(world, "streams", "prefetch")
    world.cache.on_weight_update()
    assert told == ["prefetch", "tier", "streams"]


def test_ranks_take_one_name_for_new_weights_and_another_the_next_time():
    def update(world):
        told = []
        world.tier.weights_changed = told.append
        for _ in range(2):
            world.cache.on_weight_update()
        return told

    with Ranks([World(), World()]) as ranks:
        for rank, world in enumerate(ranks.members):
            ranks.join(rank, world.cache)
        first, second = ranks.all(update)
        assert first != second


@pytest.mark.parametrize("names", [(), ("streams",), ("streams", "prefetch")])
def test_each_part_there_is_shows_its_state(names):
    world = World()
    with_parts(world, *names)
    assert world.cache.internal_state() == {"smg": dict.fromkeys(("tier", *names), 1)}


def test_a_cache_without_a_tier_has_nothing_to_show_and_no_one_to_tell():
    cache = World().cache
    cache.linker = None
    assert cache.internal_state() == {}
    cache.on_weight_update()


def test_what_ranks_know_is_reduced_over_all_groups_that_sglang_has(monkeypatch):
    """Those of context parallelism have more than one where those of tensor parallelism have none."""
    cache = World().cache
    assert cache.least_of_ranks(7, 3) == [7, 3]
    cache.attn_cp_group = "cp"
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda tensor, op, group: tensor.clamp_(max=5)
    )
    assert cache.least_of_ranks(7, 3) == [5, 3]


def test_a_hit_is_as_long_as_all_ranks_have_it():
    with Ranks([World(), World()]) as ranks:
        for rank, (world, pages) in enumerate(zip(ranks.members, (3, 2), strict=True)):
            ranks.join(rank, world.cache)
            world.tier.host_pages = pages
        assert ranks.all(lambda world: world.match(A, rid="r").host_hit_length) == 2 * PAGE


class StockLinker:
    """What SGLang's own wrapper needs of a linker."""

    def __init__(self, world) -> None:
        self._tier = world.tier
        self.pools = dict.fromkeys(world.cache.linker.cache_linker.pools)
        self.layer_done_counter = None

    def lookup(self, rid, transfers):
        return list(range(1, self._tier.host_pages + 1))

    def offload(self, transfers, session_id=None):
        return True

    def num_completed_offloads(self):
        return len(self._tier.completed)

    def pop_completed_offload(self):
        return self._tier.completed.pop(0)


@pytest.mark.parametrize("host_pages", [0, 2])
def test_ranks_agree_no_more_often_than_in_sglangs_own_linker(host_pages):
    """Collectives by step of the scheduler: what host memory has costs no other than SGLang's."""

    def collectives(world):
        counted, by_step = [], []
        world.cache._all_reduce_attn_groups = lambda tensor, op: counted.append(tensor.numel())
        world.tier.host_pages = host_pages
        longer = A + list(range(32))
        for step in (
            lambda: world.match(A, rid="new"),
            lambda: world.insert(A),
            world.cache.check_hicache_events,
            lambda: world.match(A, rid="on the device"),
            lambda: world.match(longer, rid="goes on"),
            lambda: world.tier.completed.append(True),
            world.cache.check_hicache_events,
        ):
            before = len(counted)
            step()
            by_step.append(len(counted) - before)
        return by_step

    ours, stock = World(), World()
    stock.cache.linker = UnifiedCacheLinkerWrapper(stock.cache, StockLinker(stock))
    assert collectives(ours) == collectives(stock)
