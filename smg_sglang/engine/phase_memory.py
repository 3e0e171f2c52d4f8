"""How much of a device's memory each worker may take, measured when it starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang.srt.arg_groups.overrides import resolving_view

from smg_sglang.box import box_memory
from smg_sglang.engine.phase_plan import WorkerPlan


class MemoryShares:
    """Each worker's share of what one server alone would take, in bytes, fixed at first start.

    SGLang sizes a pool as a fraction of the memory that is free when the worker starts, so a worker
    that starts again beside others needs another fraction for the same bytes.
    """

    def __init__(self, server_args: Any, plans: Sequence[WorkerPlan]) -> None:
        view = resolving_view(server_args)
        # --max-total-tokens is per worker, whatever the share.
        self._fraction = None if view.max_total_tokens is not None else view.mem_fraction_static
        self._free_at_start = {plan.device: free_bytes(plan.device) for plan in plans}

    def fraction(self, plan: WorkerPlan) -> float | None:
        """`mem_fraction_static` for a worker about to start; None leaves SGLang's own."""
        alone = plan.memory_share == 1.0
        if self._fraction is None or alone:
            return None
        wanted = self._free_at_start[plan.device] * self._fraction * plan.memory_share
        return min(0.95, wanted / max(1, free_bytes(plan.device)))


def free_bytes(device: str) -> int:
    """Free memory of a device, without making a CUDA context in this process."""
    if device == "cpu":
        return box_memory().available
    import pynvml  # type: ignore[import-untyped]
    import torch

    # torch's own mapping of CUDA_VISIBLE_DEVICES to NVML's numbers; it also initialises NVML.
    handle = torch.cuda._get_pynvml_handler(int(device.removeprefix("cuda:")))
    return int(pynvml.nvmlDeviceGetMemoryInfo(handle).free)
