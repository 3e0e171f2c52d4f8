"""What the plugin registers where, and that nothing comes of it without `--enable-smg`."""

from __future__ import annotations

import multiprocessing
import pkgutil
import subprocess
import sys
from collections import Counter
from importlib.metadata import entry_points
from types import ModuleType, SimpleNamespace

import pytest

from smg_sglang.engine.options.record import ATTRIBUTE, is_enabled
from smg_sglang.engine.seams import launch, plugin

ARGUMENTS = {
    f"server_args.ServerArgs.{name}"
    for name in ("add_cli_args", "from_cli_args", "resolve_once", "check_server_args")
}
#: Modules that only workers have imported, or that only the main process will.
MAIN_ONLY = {"utils.common"}
WORKER_ONLY = {"managers", "mem_cache", "model_executor"}


@pytest.fixture
def registered(monkeypatch):
    """Registers in a process of some role; the targets, each as often as it was registered."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    def register(*, main, worker, controller=False, times=1):
        seen = Counter()
        name = "sglang.srt.managers.scheduler"
        with monkeypatch.context() as role:
            role.setattr(HookRegistry, "register", lambda target, *_: seen.update([target]))
            title = plugin.CONTROLLER_TITLE if controller else "sglang::detokenizer"
            role.setattr(plugin.setproctitle, "getproctitle", lambda: title)
            role.setattr(multiprocessing, "parent_process", lambda: None if main else "parent")
            if worker:
                role.setitem(sys.modules, name, sys.modules.get(name, ModuleType(name)))
            else:
                role.delitem(sys.modules, name, raising=False)
            for _ in range(times):
                plugin.register()
        return Counter({target.removeprefix("sglang.srt."): n for target, n in seen.items()})

    return register


def places(targets):
    return {part for target in targets - ARGUMENTS for part in (target.split(".", 1)[0],)}


def test_every_process_knows_the_arguments(registered):
    for main, worker in ((True, False), (False, True), (False, False)):
        assert set(registered(main=main, worker=worker)) >= ARGUMENTS


def test_a_detokenizer_gets_nothing_else(registered):
    assert set(registered(main=False, worker=False)) == ARGUMENTS


def test_a_worker_gets_hooks_of_the_scheduler_only(registered):
    assert places(set(registered(main=False, worker=True))) == WORKER_ONLY


def test_the_main_process_does_not_import_the_scheduler_for_our_hooks(registered):
    assert not places(set(registered(main=True, worker=False))) & WORKER_ONLY


def test_only_the_controller_process_gets_another_controller(registered):
    # It imports SGLang's scheduler, in whose place there may be a stand-in below.
    from smg_sglang.engine.split import controller as phase_controller  # noqa: F401

    target = "managers.data_parallel_controller.DataParallelController"
    assert target in registered(main=False, worker=True, controller=True)
    for main, worker in ((True, False), (False, True), (False, False)):
        assert target not in registered(main=main, worker=worker)


def test_registering_twice_finds_the_same_targets(registered):
    # SGLang's load_plugins() calls us once a process.
    once = registered(main=True, worker=True)
    assert set(registered(main=True, worker=True, times=2)) == set(once)


def test_every_target_exists(registered):
    for target in registered(main=True, worker=True):
        assert callable(pkgutil.resolve_name(f"sglang.srt.{target}"))


def test_the_package_announces_its_plugin_and_its_platform():
    plugins = {point.name: point.value for point in entry_points(group="sglang.srt.plugins")}
    assert plugins["smg"] == "smg_sglang.engine.seams.plugin:register"
    platforms = {point.name: point.value for point in entry_points(group="sglang.srt.platforms")}
    assert platforms["smg_cpu"] == "smg_sglang.engine.cpu.activation:activate"


def test_importing_the_plugin_imports_neither_torch_nor_the_tier():
    # Every SGLang process does it, also those of servers that do not use us.
    code = "import sys, smg_sglang.engine.seams.plugin; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "zmq", "sglang.srt.server_args", "smg_sglang.tier.host_tier"}


# ---- without the flag ----


@pytest.fixture
def plain():
    """Arguments of a server that does not use us."""
    return SimpleNamespace(model_path="m", page_size=None)


@pytest.fixture
def no_memory_server(monkeypatch):
    from smg_sglang.memory.process import MemoryProcess

    def fail(*args, **kwargs):
        raise AssertionError("a memory server was started")

    monkeypatch.setattr(MemoryProcess, "start", fail)


def test_a_record_without_the_mark_passes_through_unchanged(plain, no_memory_server):
    before = vars(plain).copy()
    plugin._before_resolve_once(plain)
    plugin._after_check(None, plain)
    launch.start_memory(plain)
    assert vars(plain) == before
    assert not is_enabled(plain)


def test_the_hooks_give_sglang_its_own_results(plain):
    # None is "leave the result, or the arguments, as they are" to SGLang's hook registry.
    assert plugin._before_resolve_once(plain) is None
    assert plugin._after_check("checked", plain) is None
    assert plugin._before_kill_tree(None) is None


def test_the_cache_is_sglangs_own(plain):
    given = {}
    context = SimpleNamespace(server_args=plain)
    made = plugin._around_create_cache(lambda ctx, **kw: given.update(kw) or "cache", context)
    assert (made, given) == ("cache", {})


def test_a_cache_class_of_another_plugin_is_kept(plain):
    class Other:
        pass

    context = SimpleNamespace(server_args=plain)
    made = plugin._around_create_cache(
        lambda ctx, cache_class: cache_class, context, cache_class=Other
    )
    assert made is Other


def test_state_and_weights_of_another_cache_are_left_alone():
    component = SimpleNamespace(scheduler=SimpleNamespace(tree_cache=object()))
    result = SimpleNamespace(internal_state={"model_path": "m"})
    assert plugin._after_internal_state(result, component) is None
    assert result.internal_state == {"model_path": "m"}
    assert plugin._before_weight_update(component, object()) is None


def test_a_worker_outside_a_split_sends_each_output_as_it_is(plain):
    from smg_sglang.engine.split import publication

    publication.attach(object(), plain)
    assert publication.state() == {}
    sender, output, request = SimpleNamespace(socket="socket"), object(), object()
    sent = publication.around_send_output(lambda *given: given, sender, output, request)
    assert sent == (sender, output, request)


def test_a_shutdown_without_a_memory_server_does_nothing(monkeypatch):
    assert launch._running == []
    launch.retire_memory()
    assert launch._running == []


# ---- with it ----


def test_a_marked_record_gets_our_cache():
    from smg_sglang.engine.cache.radix_cache import SmgRadixCache

    context = SimpleNamespace(server_args=SimpleNamespace(**{ATTRIBUTE: {}}))
    assert (
        plugin._around_create_cache(lambda ctx, cache_class: cache_class, context) is SmgRadixCache
    )


def test_killing_another_process_tree_keeps_the_memory_server(monkeypatch):
    retired = []
    monkeypatch.setattr(launch, "_running", [SimpleNamespace(retire=lambda: retired.append(1))])
    plugin._before_kill_tree(1 << 30)
    assert retired == []
    plugin._before_kill_tree(None)
    plugin._before_kill_tree(None)
    assert retired == [1]
