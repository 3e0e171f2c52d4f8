"""0012: the cache is told which requests go on waiting, once a batch has been formed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

SCHEDULER = "sglang.srt.managers.scheduler"


def form_batch(source, wrap, tree_cache):
    """The plan for a batch of the first request, while a second one goes on waiting."""
    scheduler = SimpleNamespace(
        prefill_delayer=None, tree_cache=tree_cache, waiting_queue=["first", "second"]
    )

    def form(*, running_batch, **_):
        scheduler.waiting_queue = scheduler.waiting_queue[1:]
        return "batch", running_batch

    scheduler._get_new_batch_prefill_raw = form
    function = source.function(
        SCHEDULER, "Scheduler.get_new_batch_prefill", NextBatchPlan=SimpleNamespace
    )
    return wrap(function)(scheduler, "running")


class Ours:
    """A cache that loads for requests that wait."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def prefetch_waiting(self, queue) -> None:
        self.seen.append(queue)


class Theirs:
    """A cache that knows nothing of it."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []


@pytest.mark.parametrize(("cache", "expected"), [(Ours, [["second"]]), (Theirs, [])])
def test_hook_and_patch_name_those_that_go_on_waiting(hooks, stock, patched, cache, expected):
    base = patched.module("sglang.srt.mem_cache.base_prefix_cache").BasePrefixCache
    inherits = type("Inherits", (cache,), {})
    if cache is Theirs:
        inherits.prefetch_waiting = base.prefetch_waiting
    target = "managers.scheduler.Scheduler.get_new_batch_prefill"
    with_hook, with_patch = cache(), inherits()
    plans = [
        form_batch(stock, lambda f: hooks.wrap(target, f), with_hook),
        form_batch(patched, lambda f: f, with_patch),
    ]
    assert plans[0] == plans[1] == SimpleNamespace(batch_to_run="batch", running_batch="running")
    assert with_hook.seen == with_patch.seen == expected
