"""0006: the cache sees a retracted request while it still has its slots."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

BATCH = "sglang.srt.managers.schedule_batch"


def retract(source, wrap, tree_cache):
    """What happened, in order, when a request was retracted."""
    seen = tree_cache.seen
    function = source.function(
        BATCH,
        "release_req",
        get_disagg=lambda: SimpleNamespace(disaggregation_mode="null"),
        release_kv_cache=lambda req, cache, checkpoint: seen.append("released"),
        envs=SimpleNamespace(SGLANG_RETRACT_DECODE_STEPS=SimpleNamespace(get=lambda: 20)),
        evict_from_tree_cache=lambda cache, num_tokens: seen.append("evicted"),
    )
    saved = wrap(function)(
        req=SimpleNamespace(reset_for_retract=lambda: seen.append("reset")),
        remaing_req_count=1,
        req_to_token_pool=None,
        token_to_kv_pool_allocator=None,
        tree_cache=tree_cache,
        hisparse_coordinator=None,
    )
    assert saved is True
    return seen


class Ours:
    """A cache that saves what it has of the request."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def before_retraction(self, req) -> None:
        assert req is not None
        self.seen.append("saved")


class Theirs:
    """A cache that knows nothing of it."""

    def __init__(self) -> None:
        self.seen: list[str] = []


@pytest.mark.parametrize(
    ("cache", "expected"),
    [(Ours, ["saved", "released", "evicted", "reset"]), (Theirs, ["released", "evicted", "reset"])],
)
def test_hook_and_patch_let_the_cache_save_it_first(hooks, stock, patched, cache, expected):
    base = patched.module("sglang.srt.mem_cache.base_prefix_cache").BasePrefixCache
    inherits = type("Inherits", (cache,), {})
    if cache is Theirs:
        inherits.before_retraction = base.before_retraction
    hooked = retract(stock, lambda f: hooks.wrap("managers.schedule_batch.release_req", f), cache())
    assert hooked == retract(patched, lambda f: f, inherits()) == expected
