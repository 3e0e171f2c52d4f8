"""How much of a device's memory each worker may take, measured when it starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang.srt.arg_groups.overrides import resolving_view

from smg_sglang.box import box_memory
from smg_sglang.engine.split.plan import WorkerPlan

#: More than this of what is free is never given to one worker.
MAX_FRACTION = 0.95


class MemoryShares:
    """Each worker's weights and its share of the KV pool that is left, fixed at first start.

    SGLang takes a fraction, for weights and pool, of the memory that is free when the worker
    starts; so a worker that starts again beside others needs another fraction for the same bytes.
    """

    def __init__(self, server_args: Any, plans: Sequence[WorkerPlan]) -> None:
        view = resolving_view(server_args)
        # --max-total-tokens is per worker, whatever the share.
        self._fraction = None if view.max_total_tokens is not None else view.mem_fraction_static
        self._free_at_start = {plan.device: free_bytes(plan.device) for plan in plans}
        self._neighbours = Counter(plan.device for plan in plans)
        self._weights = weight_bytes(view.model_path) // view.tp_size

    def fraction(self, plan: WorkerPlan) -> float | None:
        """`mem_fraction_static` for a worker about to start; None leaves SGLang's own."""
        if self._fraction is None or self._neighbours[plan.device] == 1:
            return None
        wanted = share_bytes(
            self._free_at_start[plan.device] * self._fraction,
            weights=self._weights,
            workers=self._neighbours[plan.device],
            share=plan.memory_share,
        )
        return min(MAX_FRACTION, wanted / max(1, free_bytes(plan.device)))


def share_bytes(total: float, *, weights: int, workers: int, share: float) -> float:
    """Weights and pool of one worker of several that share `total` bytes: each has the weights."""
    return weights + share * max(0.0, total - workers * weights)


def weight_bytes(model_path: str) -> int:
    """Size of a local model's weight files; 0 for one that is not local."""
    folder = Path(model_path)
    if not folder.is_dir():
        return 0
    for suffix in ("*.safetensors", "*.bin", "*.pt", "*.gguf"):
        if size := sum(file.stat().st_size for file in folder.glob(suffix)):
            return size
    return 0


def free_bytes(device: str) -> int:
    """Free memory of a device, without making a CUDA context in this process."""
    if device == "cpu":
        return box_memory().available
    import pynvml  # type: ignore[import-untyped]
    import torch

    # torch's own mapping of CUDA_VISIBLE_DEVICES to NVML's numbers; it also initialises NVML.
    handle = torch.cuda._get_pynvml_handler(int(device.removeprefix("cuda:")))
    return int(pynvml.nvmlDeviceGetMemoryInfo(handle).free)
