"""SGLang's own HiCache on a CPU, for the benchmark only: the two CUDA calls in its way replaced.

A server that has this folder on its PYTHONPATH finds it as a plugin; no other does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch


def register() -> None:
    """Called by SGLang in each of its processes; only schedulers have a host pool."""
    if "sglang.srt.managers.scheduler" not in sys.modules or torch.cuda.is_available():
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    target = "sglang.srt.managers.scheduler.Scheduler.__init__"
    HookRegistry.register(target, _replace_cuda_calls, HookType.BEFORE)


def _replace_cuda_calls(*args: Any, **kwargs: Any) -> None:
    from sglang.srt.mem_cache.pool_host import base, common, mha

    # It wants 10 GiB left free, and the other servers are on the same box.
    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 1 << 30
    common._cuda_host_register = _register_nothing
    mha.transfer_kv_direct = _copy_rows


def _register_nothing(*args: Any, **kwargs: Any) -> None:
    """A CPU reads host memory as it is."""


def _copy_rows(
    src_layers: Sequence[torch.Tensor],
    dst_layers: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """What sgl_kernel's `transfer_kv_direct` does: rows by index, layer by layer."""
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices]
