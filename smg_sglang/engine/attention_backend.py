"""The name `smg_cpu` for `--attention-backend`; the backend itself is in `cpu_attention`.

Light to import: SGLang calls `register` in each of its processes, and most compute nothing.
"""

from __future__ import annotations

from typing import Any

from smg_sglang.errors import ConfigError

NAME = "smg_cpu"


def register() -> None:
    """Make the backend known to this process; more than once does no harm.

    The choices of the flag need it before arguments are parsed, the registry before a model
    runner is built; a seam of SGLang's own (`attention_registry.register_attention_backend`).
    """
    from sglang.srt.arg_groups import choices
    from sglang.srt.layers.attention.attention_registry import (
        ATTENTION_BACKENDS,
        register_attention_backend,
    )

    if NAME not in choices.ATTENTION_BACKEND_CHOICES:
        choices.add_attention_backend_choices([NAME])
    if NAME not in ATTENTION_BACKENDS:
        register_attention_backend(NAME)(create)


def create(model_runner: Any) -> Any:
    """Return the backend for this model runner.

    Raises ConfigError where its device is not the CPU.
    """
    if model_runner.device != "cpu":
        raise ConfigError(
            f"--attention-backend {NAME} is for the CPU, but the device is {model_runner.device}: "
            "leave the flag out, or give --device cpu"
        )
    from smg_sglang.engine.cpu_attention import CpuAttentionBackend

    return CpuAttentionBackend(model_runner)
