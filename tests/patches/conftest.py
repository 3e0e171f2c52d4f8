"""Our hooks as SGLang would have them, and SGLang as it is and as it would be."""

from __future__ import annotations

import importlib
import multiprocessing
import sys
from collections import defaultdict
from types import ModuleType, SimpleNamespace

import pytest

from . import upstream


class Hooks:
    """What `plugin.register()` registers, by target, and a way to wrap something in it."""

    def __init__(self, by_target: dict[str, list]) -> None:
        self.by_target = by_target

    def wrap(self, target: str, original):
        """`original` as `HookRegistry.apply_hooks` would leave it."""
        from sglang.srt.plugins.hook_registry import _wrap_fn

        for kind, function in self.by_target.get(f"sglang.srt.{target}", ()):
            replaced = isinstance(function, type)
            original = function if replaced else _wrap_fn(original, function, kind)
        return original

    def apply(self, target: str, cls: type, *names: str) -> None:
        """Wrap methods of a class, static and class methods as what they are."""
        for name in names:
            raw = vars(cls)[name]
            wrapped = self.wrap(f"{target}.{name}", getattr(raw, "__func__", raw))
            kept = type(raw) if isinstance(raw, staticmethod | classmethod) else lambda f: f
            setattr(cls, name, kept(wrapped))


@pytest.fixture
def hooks(monkeypatch) -> Hooks:
    """The hooks of the main process, of a worker and of the data-parallel controller."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    from smg_sglang.engine.seams import plugin

    # It imports SGLang's scheduler, so it comes before that has a stand-in.
    importlib.import_module("smg_sglang.engine.split.controller")
    by_target = defaultdict(list)
    scheduler = "sglang.srt.managers.scheduler"
    with monkeypatch.context() as all_roles:
        all_roles.setattr(
            HookRegistry,
            "register",
            lambda target, hook, kind, **_: by_target[target].append((kind, hook)),
        )
        all_roles.setattr(multiprocessing, "parent_process", lambda: None)
        title = plugin.CONTROLLER_TITLE
        all_roles.setattr(plugin.setproctitle, "getproctitle", lambda: title)
        stand_in = sys.modules.get(scheduler, ModuleType(scheduler))
        all_roles.setitem(sys.modules, scheduler, stand_in)
        plugin.register()
    return Hooks(by_target)


@pytest.fixture
def stock(tmp_path, monkeypatch) -> upstream.Source:
    """SGLang as installed."""
    return upstream.Source(tmp_path / "nothing", monkeypatch)


@pytest.fixture
def patched(tmp_path, monkeypatch) -> upstream.Source:
    """SGLang with all our patches."""
    return upstream.Source(upstream.apply(upstream.PATCHES, tmp_path), monkeypatch)


@pytest.fixture
def sglangs(hooks, stock, patched) -> tuple[Hooks, upstream.Source, upstream.Source]:
    """The hooks, and what to compare."""
    return hooks, stock, patched


@pytest.fixture
def load(monkeypatch):
    """SGLang's scheduling policy, with what an adder reads of the configuration."""

    def load(source):
        module = source.module("sglang.srt.managers.schedule_policy")
        features = SimpleNamespace(enable_encoder_swa_bounded_replay=False)
        monkeypatch.setattr(module, "get_exec", lambda: SimpleNamespace(features=features))
        schedule = SimpleNamespace(schedule_policy="fcfs")
        monkeypatch.setattr(module, "get_schedule", lambda: schedule)
        return module

    return load
