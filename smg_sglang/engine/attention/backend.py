"""The name `smg` for `--attention-backend`; the backends are in `cpu` and `cuda` beside
this module.

Light to import: SGLang calls `register` in each of its processes, and most compute nothing.
"""

from __future__ import annotations

from typing import Any

from smg_sglang.engine.options.record import NAME, NAMES
from smg_sglang.errors import ConfigError


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


def expand_prefixes() -> None:
    """Have MLA's prompts expanded over prefixes in the cache, too, as under FlashInfer's name.

    For processes with a model, before SGLang loads it. No model asks on a CPU.
    """
    import torch
    from sglang.srt.arg_groups import choices

    chunked = choices.CHUNKED_PREFIX_CACHE_SUPPORTED_ATTENTION_BACKENDS
    if NAME not in chunked and torch.cuda.is_available():
        choices.add_chunked_prefix_cache_attention_backend(NAME)


def create(model_runner: Any) -> Any:
    """Return the backend for this model runner: ours on a CPU; on CUDA SGLang's own for FlashInfer,
    or one of `cuda` where contexts may be larger than the device.

    Raises ConfigError for other devices, and for models that cannot be streamed on CUDA.
    """
    if model_runner.device == "cpu":
        from smg_sglang.engine.attention.cpu import CpuAttentionBackend

        return CpuAttentionBackend(model_runner)
    if model_runner.device != "cuda":
        raise ConfigError(
            f"--attention-backend {NAME} works on a CPU and on CUDA, but the device is "
            f"{model_runner.device}: leave the flag out"
        )
    return _on_cuda(model_runner)


def _on_cuda(model_runner: Any) -> Any:
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    from smg_sglang.engine.options import record

    if not record.chosen(model_runner.server_args).stream_context:
        return ATTENTION_BACKENDS["flashinfer"](model_runner)
    from smg_sglang.engine.attention import cuda as cuda_attention

    return cuda_attention.create(model_runner)
