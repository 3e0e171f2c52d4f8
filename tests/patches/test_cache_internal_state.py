"""0003: what `/server_info` shows of the cache."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

INTERNAL_STATE = "sglang.srt.managers.scheduler_components.internal_state"
TARGET = INTERNAL_STATE.removeprefix("sglang.srt.") + ".SchedulerInternalStateController"
TIER = {"memory_connected": True, "hit_tokens": {"host": 64}, "memory": None}


def shown(source, monkeypatch, tree_cache, change_class=lambda cls: None):
    module = source.module(INTERNAL_STATE)
    config = SimpleNamespace(resolved_server_args_dict=lambda: {"model_path": "m"})
    monkeypatch.setattr(module, "get_context", lambda: config)
    controller = module.SchedulerInternalStateController
    for name in vars(controller).copy():
        if name.startswith("_add_") and name != "_add_tree_cache":
            setattr(controller, name, lambda self, state: None)
    change_class(controller)
    scheduler = SimpleNamespace(tree_cache=tree_cache)
    return controller(scheduler, record_step_time=False).get_internal_state(None).internal_state


@pytest.mark.parametrize("state", [{"smg": TIER}, {}, None], ids=["ours", "empty", "a stock cache"])
def test_hook_and_patch_show_the_same(sglangs, monkeypatch, state):
    hooks, stock, patched = sglangs
    base = patched.module("sglang.srt.mem_cache.base_prefix_cache").BasePrefixCache
    ours = SimpleNamespace() if state is None else SimpleNamespace(internal_state=lambda: state)
    theirs = (
        ours
        if state is not None
        else SimpleNamespace(internal_state=lambda: base.internal_state(None))
    )
    hooked = shown(
        stock, monkeypatch, ours, lambda cls: hooks.apply(TARGET, cls, "get_internal_state")
    )
    assert hooked == shown(patched, monkeypatch, theirs)
    assert hooked == {"model_path": "m"} | (state or {})
