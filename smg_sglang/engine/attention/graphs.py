"""Lets an attention backend have a batch computed without a CUDA graph.

SGLang decides on graphs by what a batch looks like; a backend has no say in it
(`patches/sglang-0.5.23/0011`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def around_can_run_graph(original: Callable[..., Any], runner: Any, forward_batch: Any) -> Any:
    """Ask the runner's attention backend first, where it has an opinion."""
    backend = runner.model_runner.attn_backend
    ask: Callable[[Any], bool] | None = getattr(backend, "can_run_graph", None)
    if ask is not None and not ask(forward_batch):
        return False
    return original(runner, forward_batch)
