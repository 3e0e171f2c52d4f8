"""Hints of requests, and without: a real memory server, SGLang's allocator and Rust tree."""

import random
from array import array
from types import SimpleNamespace

import pytest
from sglang.srt.managers.kv_hints import decode_kv_hints_envelope
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams

from smg_sglang.config import WritePolicy
from smg_sglang.transfer.mover import random_delay

from . import test_prefetch
from .test_prefetch import PAGE, SLOTS, key

pytestmark = pytest.mark.usefixtures("no_disaggregation")


class World(test_prefetch.World):
    """With requests that carry hints."""

    @property
    def hints(self):
        return self.cache.hints

    def outcomes(self):
        return dict(self.tier.hints.outcomes)

    def end(self, req):
        """A request has been computed and ends; its slots are the tree's."""
        self.compute(list(req.origin_input_ids) + list(req.output_ids[:-1]))
        self.cache.on_release(req, checkpointed=True)
        self.spilled()
        return req

    def say(self, kind, payload, tokens, salt=None):
        message = SimpleNamespace(
            input_ids=list(tokens),
            extra_key=None,
            cache_salt=salt,
            kv_hints=envelope(kind, payload),
        )
        (outcome,) = self.cache.take_kv_hints(message)
        return outcome

    def retained(self):
        return self.tier.connections.connection().stats(5).pages_retained

    def evict(self, tokens):
        evicted = self.cache.evict(EvictParams(num_tokens=tokens)).num_tokens_evicted
        self.check()
        return evicted


def envelope(kind, payload, version="1"):
    action = {
        "action_id": "a",
        "action_type": kind,
        "action_version": version,
        "payload": payload,
    }
    return decode_kv_hints_envelope(
        {"protocol_version": "1", "message_id": "m", "actions": [action]}
    )


def request(rid, tokens, hints, answer=()):
    tokens, answer = array("q", tokens), array("q", answer)
    return SimpleNamespace(
        rid=rid,
        origin_input_ids=tokens,
        output_ids=answer,
        extra_key=None,
        cache_salt=None,
        kv_hints=hints,
        session=None,
        finished=lambda: True,
        owned_kv_len=lambda: len(tokens) + max(0, len(answer) - 1),
    )


A = list(range(100, 140))
B = list(range(200, 240))
C = list(range(300, 340))


def test_what_a_request_retains_is_its_prompt_and_its_answer(make_world):
    world = make_world()
    world.end(request("r", A, envelope("retain", {"seconds": 60}), answer=range(9)))
    assert world.outcomes() == {"retain met": 1}
    assert world.retained() == 48 // PAGE


def test_a_part_of_the_prompt_is_retained_where_tokens_say_so(make_world):
    world = make_world()
    world.end(request("r", A, envelope("retain", {"seconds": 60, "tokens": 17})))
    assert world.retained() == 4


def test_write_back_retains_when_the_device_evicts(make_world):
    world = make_world(policy=WritePolicy.WRITE_BACK)
    world.end(request("r", A, envelope("retain", {"seconds": 60})))
    assert (world.retained(), world.outcomes()) == (0, {})
    world.evict(SLOTS)
    assert (world.retained(), world.outcomes()) == (10, {"retain met": 1})


def test_a_session_is_retained_until_it_is_demoted(make_world):
    world = make_world()
    retain = envelope("retain", {"session": "s"})
    world.end(request("1", A, retain))
    world.end(request("2", A + B, retain))
    assert world.retained() == 20
    assert world.say("demote", {"session": "other"}, []) == "absent"
    assert world.say("demote", {"session": "s"}, [], salt="another tenant") == "absent"
    assert world.say("demote", {"session": "s"}, []) == "met"
    assert world.retained() == 0


def test_the_device_gives_up_first_what_was_demoted_last(make_world):
    world = make_world()
    for tokens in (A, B):
        world.compute(tokens)
    world.end(request("r", C, envelope("demote", {})))
    assert world.evict(8) == 40
    assert [world.on_device(tokens) for tokens in (A, B, C)] == [40, 40, 0]
    assert world.evict(8) == 40
    assert world.on_device(B) == 40


def test_what_others_share_of_it_stays_on_the_device(make_world):
    world = make_world()
    world.compute(A + B)
    world.end(request("r", A + C, envelope("demote", {})))
    assert world.evict(8) == 40
    assert world.on_device(A + B) == 80


def test_a_whole_chain_of_nodes_that_is_not_shared_goes(make_world):
    world = make_world()
    for turn in (A, A + B):
        world.compute(turn)
    world.compute(C)
    world.spilled()
    assert world.say("demote", {}, A + B) == "met"
    assert world.evict(60) == 80
    assert (world.on_device(A + B), world.on_device(C)) == (0, 40)


def test_what_a_request_uses_is_not_taken_from_it(make_world):
    world = make_world()
    world.compute(A)
    world.compute(B)
    world.spilled()
    assert world.say("demote", {}, B) == "met"
    node = world.cache.match_prefix(MatchPrefixParams(key=key(B))).last_device_node
    lock = world.cache.lock(node)
    world.evict(8)
    assert world.on_device(B) == 40
    world.cache.unlock(lock)


@pytest.mark.parametrize("again", ["asked for", "retained"])
def test_what_is_wanted_again_is_demoted_no_longer(make_world, again):
    world = make_world()
    world.compute(A)
    world.compute(B)
    world.spilled()
    world.say("demote", {}, B)
    if again == "retained":
        world.say("retain", {"seconds": 5}, B)
    else:
        req = request("r", [*B, 1, 2], None)
        world.cache.match_prefix(MatchPrefixParams(key=key([*B, 1, 2]), req=req))
        world.tier.forget("r")
    world.evict(8)
    assert world.on_device(B) == 40


def test_a_prefix_is_brought_to_the_device_before_its_request(make_world):
    world = make_world()
    world.compute(A)
    world.leave_device()
    assert world.on_device(A) == 0
    assert world.say("prefetch", {}, A) == "pending"
    world.settle()
    world.step()
    assert world.on_device(A) == 40
    assert world.outcomes() == {"prefetch met": 1}
    assert world.hints.prompts() == []


def test_what_is_nowhere_cannot_be_brought(make_world):
    world = make_world()
    assert world.say("prefetch", {}, A) == "pending"
    for _ in range(3):
        world.step()
    assert world.outcomes() == {"prefetch absent": 1}


def test_a_request_may_name_another_prefix_to_be_brought(make_world):
    world = make_world()
    world.compute(A)
    world.leave_device()
    req = request("r", B, envelope("prefetch", {"input_ids": A}))
    for _ in range(2):
        world.cache.match_prefix(MatchPrefixParams(key=key(B), req=req))
    world.settle()
    world.step()
    assert world.on_device(A) == 40
    world.cache.on_release(req, checkpointed=False)
    assert world.outcomes() == {"prefetch met": 1}


def test_a_request_that_leaves_before_it_ran_cannot_meet_its_hints(make_world):
    world = make_world()
    req = request("r", B, envelope("retain", {"seconds": 5}))
    world.cache.match_prefix(MatchPrefixParams(key=key(B), req=req))
    world.cache.linker.release_request("r")
    assert world.outcomes() == {"retain absent": 1}


@pytest.mark.parametrize(
    ("kind", "payload", "version", "counted"),
    [
        ("retain", {"seconds": -1}, "1", "retain malformed"),
        ("retain", {"seconds": 1}, "7", "retain unsupported"),
        ("teleport", {}, "1", "other unsupported"),
    ],
)
def test_what_is_no_hint_is_counted_and_the_request_goes_on(
    make_world, kind, payload, version, counted
):
    world = make_world()
    req = request("r", A, envelope(kind, payload, version))
    world.cache.match_prefix(MatchPrefixParams(key=key(A), req=req))
    world.end(req)
    assert world.outcomes() == {counted: 1}
    assert world.on_device(A) == 40


def test_a_prefix_without_a_whole_page_is_absent(make_world):
    world = make_world()
    assert world.say("retain", {"seconds": 5}, [1]) == "absent"
    assert world.say("demote", {}, []) == "absent"


def test_a_flush_forgets_what_was_said(make_world):
    world = make_world()
    world.compute(A)
    world.spilled()
    world.say("demote", {}, A)
    world.say("prefetch", {}, B)
    world.cache.reset()
    world.allocator.clear()
    assert world.hints.prompts() == []
    assert world.outcomes() == {"demote met": 1, "prefetch absent": 1}
    world.compute(B)
    world.compute(A)
    world.spilled()
    assert world.evict(8) == 40
    assert world.on_device(A) == 40


class Storage:
    """Storage that brings a prefix to host memory when it is told to arrive."""

    def __init__(self):
        self.asked, self.done, self.forgotten = [], False, []

    def bring(self, rid, path, have):
        self.asked.append((rid, len(path) // 16, have))

    def brought(self, rid):
        return self.done

    def forget(self, rid):
        self.forgotten.append(rid)


def test_what_storage_brings_goes_on_to_the_device(make_world):
    world = make_world()
    world.tier.stored = storage = Storage()
    world.compute(A)
    world.leave_device()
    assert world.say("prefetch", {}, A) == "pending"
    rid = world.hints._coming and next(iter(world.hints._coming))
    assert storage.asked == [(rid, 10, 10)]
    world.settle()
    assert (world.on_device(A), world.hints.prompts()) == (0, []), "storage may have more of it"
    storage.done = True
    world.settle()
    world.step()
    assert world.on_device(A) == 40
    assert storage.forgotten == [rid]
    assert world.outcomes() == {"prefetch met": 1}
    world.tier.stored = None


def test_without_loads_ahead_storage_brings_it_to_host_memory(make_world):
    world = make_world()
    world.cache.prefetch = None
    world.compute(A)
    world.spilled()
    assert world.say("prefetch", {}, A) == "met"
    assert world.say("prefetch", {}, A + B) == "partial"
    world.tier.stored = storage = Storage()
    assert world.say("prefetch", {}, A) == "pending"
    storage.done = True
    world.cache.check_hicache_events()
    assert world.outcomes() == {"prefetch met": 2, "prefetch partial": 1}
    world.tier.stored = None


def test_a_prefix_is_prefetched_no_longer_than_so_many_steps(make_world, monkeypatch):
    from smg_sglang.engine.cache import hints

    monkeypatch.setattr(hints, "MOST_STEPS", 3)
    world = make_world()
    world.tier.stored = Storage()
    world.say("prefetch", {}, A)
    for _ in range(4):
        world.step()
    assert world.outcomes() == {"prefetch absent": 1}
    world.tier.stored = None


def test_what_the_device_has_no_room_for_makes_way_for_requests_that_wait(make_world, monkeypatch):
    from smg_sglang.engine.cache import hints

    monkeypatch.setattr(hints, "MOST_IDLE_STEPS", 3)
    world, long = make_world(), list(range(1000, 1120))
    world.compute(long)
    world.leave_device()
    world.say("prefetch", {}, long)
    world.settle()
    for _ in range(5):
        world.step()
    assert world.on_device(long) == SLOTS // 4
    assert world.outcomes() == {"prefetch partial": 1}


def test_only_so_many_prefixes_are_prefetched_at_once(make_world, monkeypatch):
    from smg_sglang.engine.cache import hints

    monkeypatch.setattr(hints, "MOST_COMING", 1)
    world = make_world()
    assert [world.say("prefetch", {}, tokens) for tokens in (A, B)] == ["pending", "unavailable"]


@pytest.mark.parametrize("seed", range(3))
def test_ranks_have_the_same_tree_whatever_is_said(make_world, seed):
    """One copies slowly, and cannot ask its memory for a while."""
    rng = random.Random(seed)
    fast, slow = make_world(), make_world(before_copy=random_delay(0.002))
    storages = Storage(), Storage()
    for world, storage in zip((fast, slow), storages, strict=True):
        world.tier.stored = storage
    with test_prefetch.ranks_of(fast, slow) as ranks:
        for step in range(300):
            slow.tier.lookups._timeout_s = 0 if 100 < step < 130 else 5
            tokens = rng.choice(test_prefetch.PROMPTS)
            match rng.randrange(6):
                case 0:
                    ranks.all(World.compute, tokens[:32])
                case 1:
                    ranks.all(test_prefetch.evict, rng.randrange(SLOTS // 2))
                case 2:
                    ranks.each(World.say, "demote", {}, tokens)
                case 3:
                    ranks.each(World.say, "prefetch", {}, tokens)
                case 4:
                    ranks.each(World.say, "retain", {"seconds": 5, "session": "s"}, tokens)
                case 5:
                    rng.choice(storages).done = rng.random() < 0.7
            ranks.all(World.step)
            ranks.all(World.on_device, rng.choice(test_prefetch.PROMPTS))
        for storage in storages:
            storage.done = True
        ranks.all(World.spilled)
        ranks.all(World.settle)
        assert ranks.all(test_prefetch.is_free_in_the_end)
        assert ranks.all(lambda world: world.tier.counters.prefetched_tokens) > 0
    for world in (fast, slow):
        world.tier.stored = None


def test_sessions_and_demoted_prefixes_are_kept_in_mind_within_bounds(make_world, monkeypatch):
    from smg_sglang.engine.cache import hints

    monkeypatch.setattr(hints, "MOST_TOKENS", 100)
    known = hints._Known(3)
    prompts = [SimpleNamespace(origin_input_ids=[0] * 40) for _ in range(4)]
    for number, prompt in enumerate(prompts):
        known.put(number, prompt)
    assert list(known.prompts) == [2, 3]
    for number in range(4, 8):
        known.put(number, SimpleNamespace(origin_input_ids=[]))
    assert list(known.prompts) == [5, 6, 7]
