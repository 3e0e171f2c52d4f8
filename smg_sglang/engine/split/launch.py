"""In the main process, before the workers start: who runs where, and a place for the sockets."""

from __future__ import annotations

import atexit
import logging
import os
from typing import Any

import msgspec
from sglang.srt.arg_groups.overrides import resolving_view

from smg_sglang.config import SmgConfig
from smg_sglang.engine.cpu.platform import THREADS_BIND
from smg_sglang.engine.options.record import carried, chosen
from smg_sglang.engine.split.plan import WorkerPlan, make_plan
from smg_sglang.engine.split.sockets import make_directory, remove_directories
from smg_sglang.phase.requests import Role

logger = logging.getLogger(__name__)


def prepare(server_args: Any) -> None:
    """Write the workers' plans and the socket directory into the record; nothing without a split.

    Raises:
        ConfigError: devices that are not there, or no place for sockets.
    """
    choice = carried(server_args)
    if "plans" in choice:
        return
    config = chosen(server_args)
    if not config.workers:
        return
    roles = [Role.PREFILL] * config.prefill_workers + [Role.DECODE] * config.decode_workers
    view = resolving_view(server_args)
    plans = make_plan(
        roles,
        tp_size=view.tp_size,
        num_cuda=_num_cuda(view.device),
        prefill_devices=config.prefill_devices,
        decode_devices=config.decode_devices,
    )
    choice["sockets"] = str(make_directory())
    atexit.register(retire)
    choice["plans"] = [msgspec.structs.asdict(plan) for plan in plans]
    _announce(plans, config)


def retire() -> None:
    """Remove the sockets; idempotent."""
    remove_directories()


def _num_cuda(device: str) -> int:
    if not str(device).startswith("cuda"):
        return 0
    import torch

    return torch.cuda.device_count()


def _announce(plans: list[WorkerPlan], config: SmgConfig) -> None:
    cores = os.environ.get(THREADS_BIND, "").split("|")
    for plan in plans:
        where = plan.device
        if where == "cpu" and plan.gpu_id < len(cores) and cores[plan.gpu_id]:
            where = f"CPU cores {cores[plan.gpu_id]}"
        logger.info(
            "smg: %s on %s, %.0f %% of its memory", plan.name, where, 100 * plan.memory_share
        )
    logger.info(
        "smg: prompts with %d new tokens or more go through a prefill worker", config.split_tokens
    )
