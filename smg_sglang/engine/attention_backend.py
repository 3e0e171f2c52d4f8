"""The name `smg` for `--attention-backend`; the backend itself is in `cpu_attention`.

Light to import: SGLang calls `register` in each of its processes, and most compute nothing.
"""

from __future__ import annotations

from typing import Any

from smg_sglang.errors import ConfigError

NAME = "smg"
#: `smg_cpu` is its former name.
NAMES = (NAME, "smg_cpu")


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

    for name in NAMES:
        if name not in choices.ATTENTION_BACKEND_CHOICES:
            choices.add_attention_backend_choices([name])
        if name not in ATTENTION_BACKENDS:
            register_attention_backend(name)(create)


def create(model_runner: Any) -> Any:
    """Return the backend for this model runner.

    Raises ConfigError where its device is not the CPU.
    """
    if model_runner.device != "cpu":
        raise ConfigError(
            f"--attention-backend {NAME} works on a CPU only yet, but the device is "
            f"{model_runner.device}: leave the flag out, or give --device cpu"
        )
    from smg_sglang.engine.cpu_attention import CpuAttentionBackend

    return CpuAttentionBackend(model_runner)
