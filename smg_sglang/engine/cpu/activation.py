"""The plain-CPU platform: any Llama/Qwen-class model on CPU cores, without sgl_kernel.

SGLang finds `activate` through the entry point group `sglang.srt.platforms`. In its tree a CPU
needs a hand-built sgl_kernel; as an out-of-tree platform SGLang takes its pure torch paths.
Only torch (which SGLang has imported by then) and the standard library are imported here at
activation; the platform class itself is in `platform`, loaded when it is chosen.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextvars import ContextVar
from importlib.metadata import EntryPoint, entry_points

import torch

PLATFORM_NAME = "smg_cpu"
PLATFORM_CLASS = "smg_sglang.engine.cpu.platform.SmgCpuPlatform"

_GROUP = "sglang.srt.platforms"
_ACCELERATORS = ("cuda", "xpu", "mps", "npu", "musa", "hpu", "mtia")

# Set while the other plugins are asked, so that two polite plugins do not ask each other forever.
_asking_others: ContextVar[bool] = ContextVar("asking_others", default=False)


def activate() -> str | None:
    """Return the dotted path of the platform class, or None to leave the machine to another.

    None where an accelerator is visible, where SGLANG_USE_CPU_ENGINE=1 asks for SGLang's own CPU
    engine, or where another platform plugin would activate. Called once in every SGLang process.
    """
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None
    if accelerator_available() or _another_plugin_activates():
        return None
    return PLATFORM_CLASS


def accelerator_available() -> bool:
    """Whether torch sees any device but the CPU."""
    modules = (getattr(torch, name, None) for name in _ACCELERATORS)
    return any(module is not None and module.is_available() for module in modules)


def _another_plugin_activates() -> bool:
    """Ask the other platform plugins that SGLang would ask; it refuses to choose between two."""
    if _asking_others.get() or os.environ.get("SGLANG_PLATFORM"):
        return False
    asking = _asking_others.set(True)
    try:
        return any(_activates(plugin) for plugin in _other_plugins())
    finally:
        _asking_others.reset(asking)


def _other_plugins() -> Iterator[EntryPoint]:
    allowed = {name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",")} - {""}
    for plugin in entry_points(group=_GROUP):
        if plugin.name != PLATFORM_NAME and (not allowed or plugin.name in allowed):
            yield plugin


def _activates(plugin: EntryPoint) -> bool:
    try:
        return plugin.load()() is not None
    except Exception:
        # SGLang logs it and goes on without that plugin; so do we.
        return False
