"""Our choice as SGLang's record of arguments carries it, from the main process to the workers."""

from __future__ import annotations

from typing import Any

from smg_sglang.config import SmgConfig

#: An underscored attribute survives SGLang's resolution and its pickling to the workers
#: (`ServerArgs.__reduce__`).
ATTRIBUTE = "_smg"
#: What `--attention-backend` calls ours; `smg_cpu` is its former name.
NAME = "smg"
NAMES = (NAME, "smg_cpu")


def is_enabled(server_args: Any) -> bool:
    """Whether this record of arguments asked for the host tier."""
    return getattr(server_args, ATTRIBUTE, None) is not None


def carried(server_args: Any) -> dict[str, Any]:
    """All that the record carries of ours; empty without the host tier."""
    found: dict[str, Any] = getattr(server_args, ATTRIBUTE, None) or {}
    return found


def chosen(server_args: Any) -> SmgConfig:
    """The choice it carries; without the host tier, the defaults."""
    return SmgConfig.from_builtins(carried(server_args).get("config", {}))


def device_kind(server_args: Any) -> str:
    """cpu, cuda, or what else SGLang calls the device."""
    if server_args.device is not None:
        return str(server_args.device).split(":", 1)[0]
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
