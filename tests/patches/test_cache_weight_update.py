"""0004: the tier hears of new weights before the first of them is written."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

UPDATER = "sglang.srt.managers.scheduler_components.weight_updater"
TARGET = UPDATER.removeprefix("sglang.srt.") + ".SchedulerWeightUpdaterManager"
DISK = [("update_weights_from_disk", "write")]
IPC = [("update_weights_from_ipc", "write")]
TENSOR = [
    ("begin_weight_update", None),
    ("update_weights_from_tensor", "write"),
    ("end_weight_update", None),
]
GROUP = [
    ("begin_weight_update", None),
    ("update_weights_from_distributed", "write"),
    ("end_weight_update", None),
]


class Updates:
    """An updater between a cache and a runner that both tell what they see, in order."""

    def __init__(self, source, monkeypatch, cache) -> None:
        module = source.module(UPDATER)
        group = SimpleNamespace(tp_group=SimpleNamespace(cpu_group=None))
        monkeypatch.setattr(module, "get_parallel", lambda: group)
        monkeypatch.setattr(torch.distributed, "barrier", lambda group: None)
        self.seen: list[str] = []
        self.manager_class = module.SchedulerWeightUpdaterManager
        self.cache = cache(lambda: self.seen.append("told"))

    def run(self, calls) -> list[str]:
        manager = self.manager_class(
            tp_worker=SimpleNamespace(
                weight_update_runners=lambda: [("target", self._runner())],
                model_runner=self._runner(),
                deserialize_own_rank=lambda tensors: tensors,
            ),
            draft_worker=None,
            memory_saver_adapter=None,
            flush_cache=lambda empty_cache: self.seen.append("flushed") or True,
            is_fully_idle=lambda: True,
            scheduler=MagicMock(tree_cache=self.cache),
        )
        for name, _ in calls:
            done = getattr(manager, name)(MagicMock(selector="all", flush_cache=True))
            self.seen += [] if done.success else ["refused"]
        return self.seen

    def _runner(self):
        def write(*args, **kwargs):
            self.seen.append("written")
            return True, "ok"

        writes = ("update_weights_from_disk", "update_weights_from_ipc")
        writes += ("update_weights_from_tensor", "load_weights_from_distributed")
        updater = MagicMock(**{name: write for name in writes})
        return SimpleNamespace(weight_updater=updater)


def with_ear(tell):
    return SimpleNamespace(on_weight_update=tell)


@pytest.fixture
def hooked(hooks, stock, monkeypatch):
    updates = Updates(stock, monkeypatch, with_ear)
    updates.hooked = [
        name
        for name in vars(updates.manager_class)
        if f"sglang.srt.{TARGET}.{name}" in hooks.by_target
    ]
    hooks.apply(TARGET, updates.manager_class, *updates.hooked)
    return updates


@pytest.fixture
def with_patch(patched, monkeypatch):
    return Updates(patched, monkeypatch, with_ear)


@pytest.mark.parametrize(
    "calls", [DISK, IPC, TENSOR, GROUP], ids=["disk", "ipc", "tensor", "group"]
)
@pytest.mark.parametrize("which", ["hooked", "with_patch"])
def test_hook_and_patch_tell_before_the_first_write_and_before_the_flush(request, which, calls):
    seen = request.getfixturevalue(which).run(calls)
    assert seen[0] == "told"
    assert [what for what in seen if what != "told"] == ["written", "flushed"]


@pytest.mark.parametrize("which", ["hooked", "with_patch"])
def test_hook_and_patch_tell_of_weights_written_by_rdma(request, which):
    updates = request.getfixturevalue(which)
    assert updates.run([("begin_weight_update", None), ("end_weight_update", None)])[0] == "told"


@pytest.mark.parametrize("which", ["hooked", "with_patch"])
def test_hook_and_patch_say_nothing_of_what_sglang_refuses(request, which):
    updates = request.getfixturevalue(which)
    begin, end = ("begin_weight_update", None), ("end_weight_update", None)
    assert updates.run([end, begin, begin]) == ["refused", "told", "refused"]


def test_a_cache_of_sglang_hears_nothing_in_either(hooks, stock, patched, monkeypatch):
    plain = Updates(stock, monkeypatch, lambda tell: SimpleNamespace())
    names = [n for n in vars(plain.manager_class) if f"sglang.srt.{TARGET}.{n}" in hooks.by_target]
    hooks.apply(TARGET, plain.manager_class, *names)
    assert plain.run(DISK) == ["written", "flushed"]
    base = patched.module("sglang.srt.mem_cache.base_prefix_cache").BasePrefixCache
    default = SimpleNamespace(on_weight_update=lambda: base.on_weight_update(None))
    assert Updates(patched, monkeypatch, lambda tell: default).run(DISK) == ["written", "flushed"]
