"""0002: when workers are planned and the memory server is started and retired."""

from __future__ import annotations

import os
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from smg_sglang.engine.seams import launch

ENGINE = "sglang.srt.entrypoints.engine"
COMMON = "sglang.srt.utils.common"
LIFECYCLE = "sglang.srt.plugins.lifecycle"


class Stop(Exception):
    """The workers would start here."""


@pytest.fixture
def events(monkeypatch):
    """What happened, in order."""
    seen = []
    monkeypatch.setattr(launch, "check_model", lambda server_args: None)
    monkeypatch.setattr(launch, "prepare_split", lambda server_args: seen.append("planned"))
    monkeypatch.setattr(launch, "start_memory", lambda server_args: seen.append("memory"))
    monkeypatch.setattr(launch, "retire_memory", lambda: seen.append("retired"))
    return seen


def start(source, events, names, wrap_check=lambda f: f):
    def launch_workers(cls, *args, **kwargs):
        events.append("workers")
        raise Stop

    engine = SimpleNamespace()
    engine._launch_scheduler_processes = lambda *a, **k: launch_workers(engine, *a, **k)
    record = MagicMock()
    record.check_server_args = lambda: wrap_check(lambda _: events.append("checked"))(record)
    function = source.function(ENGINE, "Engine._launch_subprocesses", **names)
    with pytest.raises(Stop):
        function(engine, record, None, None, None, MagicMock())
    return events


def test_hook_and_patch_start_the_memory_server_after_the_checks_and_before_the_workers(
    hooks, stock, patched, events
):
    start(
        stock,
        events,
        {},
        wrap_check=lambda f: hooks.wrap("server_args.ServerArgs.check_server_args", f),
    )
    hooked = events.copy()
    events.clear()
    lifecycle = patched.module(LIFECYCLE)
    for step in (launch.prepare_split, launch.start_memory):
        lifecycle.on_launch(step)
    start(patched, events, {"run_launch_callbacks": lifecycle.run_launch_callbacks})
    assert hooked == events == ["checked", "planned", "memory", "workers"]


def kill(source, events, names, wrap, parent_pid):
    child = SimpleNamespace(pid=-1, kill=lambda: events.append("killed"))
    psutil = SimpleNamespace(
        Process=lambda pid: SimpleNamespace(children=lambda recursive: [child]),
        NoSuchProcess=ProcessLookupError,
    )
    function = source.function(COMMON, "kill_process_tree", psutil=psutil, os=os, **names)
    wrap(function)(parent_pid, include_parent=False, wait_timeout=None)
    return events


@pytest.mark.parametrize(
    ("parent_pid", "expected"),
    [(None, ["retired", "killed"]), (os.getpid(), ["retired", "killed"]), (1 << 30, ["killed"])],
)
def test_hook_and_patch_retire_it_only_where_this_process_kills_its_own_children(
    sglangs, events, parent_pid, expected
):
    hooks, stock, patched = sglangs
    kill(stock, events, {}, lambda f: hooks.wrap("utils.common.kill_process_tree", f), parent_pid)
    hooked = events.copy()
    events.clear()
    lifecycle = patched.module(LIFECYCLE)
    lifecycle.on_shutdown(launch.retire_memory)
    names = {"run_shutdown_callbacks": lifecycle.run_shutdown_callbacks}
    kill(patched, events, names, lambda f: f, parent_pid)
    assert hooked == events == expected


def test_a_callback_that_fails_does_not_keep_the_children_alive(patched, events):
    lifecycle = patched.module(LIFECYCLE)
    lifecycle.on_shutdown(lambda: 1 / 0)
    names = {"run_shutdown_callbacks": lifecycle.run_shutdown_callbacks}
    assert kill(patched, events, names, lambda f: f, None) == ["killed"]
