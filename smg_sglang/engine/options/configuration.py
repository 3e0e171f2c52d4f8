"""What our choice sets in SGLang's own arguments."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from smg_sglang.config import HostDtype, SmgConfig, make_config
from smg_sglang.engine.options import refusals
from smg_sglang.engine.options.record import ATTRIBUTE, NAME, device_kind

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

#: SGLang's `--mem-fraction-static` on a CPU, where nobody has said how large the pool should be.
CPU_MEM_FRACTION = 0.5
#: SGLang's `--chunked-prefill-size` where it would compute prompts in one piece, and contexts are
#: streamed: a segment of host memory, beside which the rest of a step is small.
CPU_STREAM_CHUNK = 2048


def configure(server_args: ServerArgs, given: Mapping[str, Any], origin: str) -> SmgConfig:
    """Check everything that can be checked before anything starts, then set SGLang's fields.

    Called in the main process before SGLang resolves its arguments.

    Raises:
        ConfigError: one sentence that says what to change.
    """
    device = device_kind(server_args)
    config = make_config(**{"page_size": server_args.page_size, **given}, device=device)
    refusals.refuse_untested_sglang(config)
    refusals.refuse_flags(server_args)
    if server_args.page_size is None and not keeps_states(server_args):
        server_args.page_size = config.page_size
    _leave_room(server_args, config)
    if config.host_dtype is not HostDtype.AUTO:
        refusals.refuse_beside_narrow_pages(server_args)
    if config.workers:
        refusals.refuse_beside_split(server_args)
        # The phase controller takes the place of SGLang's data-parallel controller.
        server_args.dp_size = config.workers
    server_args.enable_unified_cache_external_linker = True
    server_args.unified_cache_external_linker_backend = "dynamic"
    # Also what /server_info shows as our configuration.
    server_args.unified_cache_external_linker_config = {
        "linker": "SmgLinker",
        "linker_module_path": "smg_sglang.engine.cache.linker",
        "linker_extra_config": config.to_builtins(),
    }
    if config.stream_context:
        refusals.refuse_beside_streams(server_args)
        _prepare_streams(server_args, device)
    setattr(server_args, ATTRIBUTE, {"origin": origin, "config": config.to_builtins()})
    return config


def keeps_states(server_args: ServerArgs) -> bool:
    """Whether the model has Mamba or linear-attention layers: there SGLang chooses the page size,
    since many of them go with pages of one token only."""
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.mem_cache.kv_cache_builder import uses_ssm_state

    try:
        # A copy: what is known of the model before SGLang resolves its arguments is not kept.
        return bool(uses_ssm_state(model_config_of(copy.copy(server_args))))
    except Exception:  # no such model, or a broken one: SGLang says so better when it loads it
        return False


def _leave_room(server_args: ServerArgs, config: SmgConfig) -> None:
    """On a CPU the device pool and the host tier come out of the same DRAM; SGLang would take
    nearly all of it for the pool."""
    chosen = server_args.mem_fraction_static is not None or server_args.max_total_tokens is not None
    if device_kind(server_args) == "cpu" and config.host_gb is not None and not chosen:
        server_args.mem_fraction_static = CPU_MEM_FRACTION


def _prepare_streams(server_args: ServerArgs, device: str) -> None:
    if device == "cpu":
        if server_args.chunked_prefill_size is None:
            server_args.chunked_prefill_size = CPU_STREAM_CHUNK
        return
    refusals.refuse_beside_cuda_streams(server_args)
    server_args.attention_backend = NAME
    logger.warning(
        "--smg-stream-context on CUDA was written and checked without a GPU and has never run on "
        "one: compare its answers with those of a server without it before you rely on it."
    )
