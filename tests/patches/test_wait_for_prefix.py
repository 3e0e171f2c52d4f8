"""0013: a request waits for a prefix that another one computes, where the cache says so."""

from __future__ import annotations

import pytest

from .streams import Allocator, Plain, defaults, request

ADDER = "managers.schedule_policy.PrefillAdder"


class Waiting:
    """A cache that lets some wait, and stops at one."""

    def wait_for_prefix(self, adder, req):
        self.asked.append((req.rid, [each.rid for each in adder.can_run_list]))
        name = self.verdict_of.get(req.rid)
        return None if name is None else self.results[name]


def admit(module, cache, rids):
    """The verdicts, and who runs."""
    adder = module.PrefillAdder(
        16, cache, cache.token_to_kv_pool_allocator, None, new_token_ratio=0.5,
        rem_input_tokens=2048, rem_chunk_tokens=512,
    )  # fmt: skip
    verdicts = [
        adder.add_one_req(request(rid, 40), has_chunked_req=False, truncation_align_size=None).name
        for rid in rids
    ]
    return verdicts, [req.rid for req in adder.can_run_list]


@pytest.mark.parametrize(
    ("verdict_of", "verdicts", "run"),
    [
        ({}, ["CONTINUE"] * 3, ["a", "b", "c"]),
        ({"b": "CONTINUE"}, ["CONTINUE"] * 3, ["a", "c"]),
        ({"b": "OTHER"}, ["CONTINUE", "OTHER", "CONTINUE"], ["a", "c"]),
    ],
)
def test_hook_and_patch_pass_over_those_that_wait(sglangs, load, verdict_of, verdicts, run):
    hooks, stock, patched = sglangs
    answers, asked = [], []
    for source, hooked in ((stock, True), (patched, False)):
        module = load(source)
        if hooked:
            hooks.apply(ADDER, module.PrefillAdder, "add_one_req")
        base = Plain if hooked else defaults(source)
        cache = type("Cache", (Waiting, base), {})(Allocator())
        cache.verdict_of, cache.asked = verdict_of, []
        cache.results = module.AddReqResult
        answers.append(admit(module, cache, "abc"))
        asked.append(cache.asked)
    assert answers[0] == answers[1] == (verdicts, run)
    assert asked[0] == asked[1]
    assert [rid for rid, _ in asked[0]] == ["a", "b", "c"]


def test_hook_and_patch_ask_nothing_of_a_cache_that_knows_nothing(sglangs, load):
    hooks, stock, patched = sglangs
    answers = []
    for source, hooked in ((stock, True), (patched, False)):
        module = load(source)
        if hooked:
            hooks.apply(ADDER, module.PrefillAdder, "add_one_req")
        cache = Plain if hooked else defaults(source)
        answers.append(admit(module, cache(Allocator()), "ab"))
    assert answers[0] == answers[1] == (["CONTINUE"] * 2, ["a", "b"])
