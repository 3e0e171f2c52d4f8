"""0010: how requests beyond the device run beside others."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from .streams import DEVICE, HOST, PAGE, Allocator, Asked, Plain, Streaming, defaults, request

POLICY = "sglang.srt.managers.schedule_policy"
ADDER = "managers.schedule_policy.PrefillAdder"
BATCH = "sglang.srt.managers.schedule_batch"


def open_streams(cache, reqs):
    """What was admitted before: those that need it are streams."""
    for req in reqs:
        if cache.streams is not None and cache.streams.needs(req):
            cache.streams.open(req)


@dataclass
class Pass:
    """One pass of the scheduler, and what is to come of it.

    Attributes:
        waiting: (rid, tokens) of requests that are asked for in this order, whatever the verdicts.
        chunked: (rid, tokens, of these computed) of the one whose chunks go on.
        running: (rid, tokens) of requests that generate.
        in_host: tokens in host memory, by request.
        limit: the scheduling policy's own limit of the chunk that goes on.
        verdicts: on the waiting ones.
        runs: (rid, first token, end) of what is computed.
        left: tokens of the chunk budget, and of the device, that remain.
    """

    waiting: tuple[tuple[str, int], ...] = ()
    chunked: tuple[str, int, int] | None = None
    running: tuple[tuple[str, int], ...] = ()
    in_host: dict[str, int] = field(default_factory=dict)
    free: int = DEVICE
    host: int = HOST
    limit: int | None = None
    most: int | None = None
    verdicts: tuple[str, ...] = ()
    runs: tuple[tuple[str, int, int], ...] = ()
    left: tuple[int, int] = (512, DEVICE)

    def __call__(self, module, cache_class) -> dict[str, Any]:
        allocator = Allocator(self.free)
        with_streams = issubclass(cache_class, Streaming)
        cache = cache_class(allocator, *((self.host, self.in_host) if with_streams else ()))
        running = [request(*each, new=5000) for each in self.running]
        chunked = request(*self.chunked[:2], done=self.chunked[2]) if self.chunked else None
        open_streams(cache, [*running, *([chunked] if chunked else [])])
        adder = module.PrefillAdder(
            PAGE,
            cache,
            allocator,
            SimpleNamespace(reqs=running) if running else None,
            new_token_ratio=0.5,
            rem_input_tokens=2048,
            rem_chunk_tokens=512,
            prefill_max_requests=self.most,
        )
        adder.chunked_req_limit = self.limit
        rest = adder.add_chunked_req(chunked) if chunked else None
        verdicts = tuple(
            adder.add_one_req(
                request(*each), has_chunked_req=rest is not None, truncation_align_size=None
            ).name
            for each in self.waiting
        )
        return {
            "verdicts": verdicts,
            "runs": tuple((r.rid, r.prefix_len, r.extend_end) for r in adder.can_run_list),
            "left": (adder.rem_chunk_tokens, adder.rem_total_tokens),
            "rest": getattr(rest, "rid", None),
            "new chunked": getattr(adder.new_chunked_req, "rid", None),
            "budgets": (adder.rem_input_tokens, adder.cur_rem_tokens),
            "protected": [r.kv.cache_protected_len for r in adder.can_run_list],
            "hits": (adder.log_hit_tokens, adder.log_host_hit_tokens),
            "ours": with_streams
            and (cache.hits, {stream.req.rid: stream.host_need for stream in cache.streams}),
        }


STREAMED = {
    "its first chunk": Pass(
        waiting=(("long", 4000),),
        verdicts=("OTHER",),
        runs=(("long", 0, 512),),
        left=(0, 496),
    ),
    "a chunk as large as there is room": Pass(
        waiting=(("long", 4000),),
        free=400,
        verdicts=("OTHER",),
        runs=(("long", 0, 320),),
        left=(0, 64),
    ),
    "the rest of the chunk budget": Pass(
        waiting=(("short", 100), ("long", 4000)),
        verdicts=("CONTINUE", "OTHER"),
        runs=(("short", 0, 100), ("long", 0, 400)),
        left=(0, 380),
    ),
    "one prompt in chunks at a time": Pass(
        waiting=(("long", 4000), ("longer", 4100)),
        verdicts=("OTHER", "OTHER"),
        runs=(("long", 0, 512),),
        left=(0, 496),
    ),
    "none beside an ordinary prompt in chunks": Pass(
        waiting=(("long", 4000),),
        chunked=("ordinary", 800, 128),
        verdicts=("OTHER",),
        runs=(("ordinary", 128, 640),),
        left=(0, 496),
    ),
    "no room on the device": Pass(
        waiting=(("long", 4000),), free=90, verdicts=("NO_TOKEN",), left=(512, 90)
    ),
    "alone, whatever there is in host memory": Pass(
        waiting=(("long", 4000),),
        host=4096,
        verdicts=("OTHER",),
        runs=(("long", 0, 512),),
        left=(0, 496),
    ),
    "it waits for host memory, and does not stop others": Pass(
        waiting=(("long", 4000),),
        running=(("other", 3000),),
        verdicts=("CONTINUE",),
        left=(512, DEVICE - 64),
    ),
    "later ones do not overtake one that waits for host memory": Pass(
        waiting=(("long", 4000), ("shorter", 1000), ("ordinary", 100)),
        running=(("other", 2000),),
        verdicts=("CONTINUE", "CONTINUE", "CONTINUE"),
        runs=(("ordinary", 0, 100),),
        left=(400, DEVICE - 64 - 112 - PAGE - 100),
    ),
    "a prefix in host memory": Pass(
        waiting=(("long", 4000),),
        in_host={"long": 1600},
        verdicts=("OTHER",),
        runs=(("long", 1600, 2112),),
        left=(0, 496),
    ),
    "the whole rest, and a tail to come": Pass(
        waiting=(("long", 4000), ("short", 100)),
        in_host={"long": 3840},
        verdicts=("CONTINUE", "CONTINUE"),
        runs=(("long", 3840, 4000), ("short", 0, 100)),
        left=(240, DEVICE - 160 - PAGE - 64 - 112 - PAGE - 100),
    ),
    "as many prompts as a batch may have": Pass(
        waiting=(("short", 100), ("long", 4000)),
        most=1,
        verdicts=("CONTINUE", "OTHER"),
        runs=(("short", 0, 100),),
        left=(400, DEVICE - 112 - PAGE - 100),
    ),
    "its next chunk, and no other prompt's": Pass(
        chunked=("long", 4000, 512),
        free=500,
        runs=(("long", 512, 928),),
        left=(0, 500 - 416 - PAGE),
    ),
    "no chunk in this pass": Pass(chunked=("long", 4000, 512), free=90, left=(0, 90)),
    "a chunk that the policy limits": Pass(
        chunked=("long", 4000, 512),
        limit=128,
        runs=(("long", 512, 640),),
        left=(0, DEVICE - 128 - PAGE),
    ),
    "its last chunk, and another's first": Pass(
        waiting=(("longer", 4100),),
        chunked=("long", 4000, 3840),
        host=16_384,
        verdicts=("OTHER",),
        runs=(("long", 3840, 4000), ("longer", 0, 352)),
        left=(0, DEVICE - 160 - PAGE - 100 - 352 - PAGE),
    ),
}
ORDINARY = {
    "prompts that fit": Pass(
        waiting=(("a", 100), ("b", 200)),
        verdicts=("CONTINUE", "CONTINUE"),
        runs=(("a", 0, 100), ("b", 0, 200)),
        left=(192, DEVICE - 112 - 208 - 2 * PAGE - 200),
    ),
    "a prompt in chunks": Pass(
        waiting=(("a", 700), ("b", 600)),
        verdicts=("OTHER", "NO_TOKEN"),
        runs=(("a", 0, 512),),
        left=(0, 496),
    ),
    "its last chunk": Pass(
        waiting=(("b", 100),),
        chunked=("a", 700, 512),
        verdicts=("CONTINUE",),
        runs=(("a", 512, 700), ("b", 0, 100)),
        left=(208, DEVICE - 192 - 112 - 2 * PAGE - 200),
    ),
    "beside one that runs": Pass(
        waiting=(("a", 100),),
        running=(("b", 300),),
        free=500,
        verdicts=("NO_TOKEN",),
        left=(512, 500 - 2048),
    ),
}
ADDER_HOOKS = ("add_one_req", "add_chunked_req", "_get_running_request_total_token_offset")


def passes(sglangs, load, one, ours, theirs):
    """What comes of a pass, by the hooks and by the patch."""
    hooks, stock, patched = sglangs
    module = load(stock)
    hooks.apply(ADDER, module.PrefillAdder, *ADDER_HOOKS)
    hooked = one(module, ours)
    return hooked, one(load(patched), theirs)


def check(one: Pass, hooked: dict[str, Any], patched: dict[str, Any]) -> None:
    assert hooked == patched
    expected = {"verdicts": one.verdicts, "runs": one.runs, "left": one.left}
    assert {name: hooked[name] for name in expected} == expected


@pytest.mark.parametrize("one", STREAMED.values(), ids=STREAMED.keys())
def test_hook_and_patch_give_a_stream(sglangs, load, one):
    check(one, *passes(sglangs, load, one, Streaming, Asked))


@pytest.mark.parametrize("one", ORDINARY.values(), ids=ORDINARY.keys())
def test_hook_and_patch_leave_ordinary_requests_alone(sglangs, load, one):
    check(one, *passes(sglangs, load, one, Streaming, Asked))


@pytest.mark.parametrize("one", ORDINARY.values(), ids=ORDINARY.keys())
def test_a_cache_of_sglang_admits_as_ever(sglangs, load, one):
    check(one, *passes(sglangs, load, one, Plain, defaults(sglangs[2])))


def decode(source, wrap, cache_class, free: int, *, selected=None):
    """(what streams were told to leave when the check came, the requests it was about)."""
    cache = cache_class(Allocator(free))
    reqs = [request("long", 4000), request("ordinary", 100), request("done", 4000)]
    reqs[2].finished_reason = object()
    open_streams(cache, reqs)
    seen = []

    def capacity(*, requests, **kwargs):
        left = [] if cache.streams is None else cache.streams.left.copy()
        seen.append((left, [req.rid for req in requests]))
        return True

    cache.token_to_kv_pool_allocator.check_decode_capacity = capacity
    batch = SimpleNamespace(
        reqs=reqs,
        tree_cache=cache,
        token_to_kv_pool_allocator=cache.token_to_kv_pool_allocator,
        new_tokens_required_next_decode=lambda selected: len(reqs),
        spec_algorithm=None,
    )
    assert wrap(source.function(BATCH, "ScheduleBatch.check_decode_mem"))(batch, selected)
    return seen


@pytest.mark.parametrize(("free", "least"), [(3 * PAGE, 64), (3 * PAGE - 1, PAGE)])
def test_hook_and_patch_move_tails_before_slots_are_counted(sglangs, free, least):
    hooks, stock, patched = sglangs
    name = "managers.schedule_batch.ScheduleBatch.check_decode_mem"
    for selected, about in [(None, ["long", "ordinary", "done"]), ([1], ["ordinary"])]:
        hooked = decode(stock, lambda f: hooks.wrap(name, f), Streaming, free, selected=selected)
        assert hooked == decode(patched, lambda f: f, Asked, free, selected=selected)
        assert hooked == [([("long", least)], about)]


def test_a_cache_of_sglang_checks_a_decode_as_ever(sglangs):
    hooks, stock, patched = sglangs
    name = "managers.schedule_batch.ScheduleBatch.check_decode_mem"
    hooked = decode(stock, lambda f: hooks.wrap(name, f), Plain, 0)
    assert hooked == decode(patched, lambda f: f, defaults(patched), 0)
    assert hooked == [([], ["long", "ordinary", "done"])]
