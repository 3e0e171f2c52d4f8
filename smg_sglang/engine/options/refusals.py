"""What cannot be combined with ours, each in one sentence, before anything starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from smg_sglang import TESTED_SGLANG
from smg_sglang.config import SmgConfig, WritePolicy
from smg_sglang.engine.options.record import NAMES, chosen, device_kind
from smg_sglang.errors import ConfigError

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

#: What `--kv-cache-dtype` may store a token as; of the others parts lie beside K and V (scales).
PLAIN_KV = ("auto", "bf16", "bfloat16", "fp8_e4m3", "fp8_e5m2")
#: Query tokens times heads, of a chunk of a model with latents (MLA) that is streamed on CUDA.
LATENT_ROWS = 1 << 20


def refuse_untested_sglang(config: SmgConfig) -> None:
    import sglang

    if sglang.__version__ in TESTED_SGLANG:
        return
    tested = ", ".join(TESTED_SGLANG)
    if not config.allow_untested_sglang:
        raise ConfigError(
            f"SGLang {sglang.__version__} was not tested with smg_sglang; install sglang=={tested} "
            "or try yours with --smg-allow-untested-sglang."
        )
    logger.warning("SGLang %s was not tested with smg_sglang (%s was).", sglang.__version__, tested)


def _refuse_any(sentence: str, conflicts: Sequence[tuple[Any, str]]) -> None:
    """Raise ConfigError with the first of the conflicts that is there, in the sentence's braces."""
    for found, what in conflicts:
        if found:
            raise ConfigError(sentence.format(what))


def refuse_flags(args: ServerArgs) -> None:
    """Refuse what cannot be combined with the host tier."""
    _refuse_any(
        "--enable-smg cannot be combined with {}; drop one of the two.",
        [
            (args.enable_hierarchical_cache, "--enable-hierarchical-cache"),
            (args.hicache_storage_backend is not None, "--hicache-storage-backend"),
            (args.enable_lmcache, "--enable-lmcache"),
            (args.enable_flexkv, "--enable-flexkv"),
            (
                args.enable_unified_cache_external_linker,
                "--enable-unified-cache-external-linker",
            ),
            (args.radix_cache_backend is not None, "--radix-cache-backend"),
            (args.disable_radix_cache, "--disable-radix-cache"),
            (args.pp_size > 1, "--pp-size above 1"),
            (args.attn_cp_size > 1, "--attn-cp-size above 1"),
            (args.dcp_size > 1, "--dcp-size above 1"),
            (args.kv_cache_dtype not in PLAIN_KV, f"--kv-cache-dtype {args.kv_cache_dtype}"),
            (args.disaggregation_mode not in (None, "null"), "--disaggregation-mode"),
            (args.speculative_algorithm is not None, "--speculative-algorithm"),
            # It unmaps the pool while pages may be on their way.
            (args.enable_memory_saver, "--enable-memory-saver"),
            # Its loop never asks which copies have ended.
            (args.enable_pdmux, "--enable-pdmux"),
        ],
    )


def refuse_beside_narrow_pages(args: ServerArgs) -> None:
    """Refuse KV that has no more bits than `--smg-host-dtype fp8` leaves."""
    _refuse_any(
        "--smg-host-dtype fp8 cannot be combined with {}, which is stored as it is; drop one of "
        "the two.",
        [(args.kv_cache_dtype.startswith("fp8"), f"--kv-cache-dtype {args.kv_cache_dtype}")],
    )


def refuse_beside_split(args: ServerArgs) -> None:
    """Refuse what cannot be combined with prefill and decode workers."""
    _refuse_any(
        "--smg-prefill-workers and --smg-decode-workers cannot be combined with {}; drop one of "
        "the two.",
        [
            (args.dp_size > 1, "--dp-size above 1"),
            (args.attn_dp_size > 1, "--attn-dp-size above 1"),
            (args.enable_dp_attention, "--enable-dp-attention"),
            (args.nnodes > 1, "--nnodes above 1"),
            (args.tokenizer_worker_num > 1, "--tokenizer-worker-num above 1"),
            (args.enable_lora or args.lora_paths, "LoRA adapters"),
        ],
    )


def refuse_beside_streams(args: ServerArgs) -> None:
    """Refuse what cannot be combined with contexts that are streamed from host memory."""
    attention = args.attention_backend
    _refuse_any(
        "--smg-stream-context cannot be combined with {}; drop one of the two.",
        [
            (attention not in (None, *NAMES), f"--attention-backend {attention}"),
            (args.allow_auto_truncate, "--allow-auto-truncate"),
            (args.dllm_algorithm is not None, "--dllm-algorithm"),
            # Its ranks compute batches together: a stream in one would need graphs off in all.
            (args.enable_dp_attention, "--enable-dp-attention"),
        ],
    )


def refuse_beside_cuda_streams(args: ServerArgs) -> None:
    """Refuse what our attention backend has no kernels for on CUDA."""
    _refuse_any(
        "--smg-stream-context cannot be combined with {}; drop one of the two.",
        [
            (args.prefill_attention_backend is not None, "--prefill-attention-backend"),
            (args.decode_attention_backend is not None, "--decode-attention-backend"),
            (
                args.kv_cache_dtype not in ("auto", "bf16", "bfloat16"),
                f"--kv-cache-dtype {args.kv_cache_dtype} on CUDA",
            ),
            (args.enable_two_batch_overlap, "--enable-two-batch-overlap"),
        ],
    )


def refuse_streams(args: ServerArgs) -> None:
    """Refuse contexts from host memory where resolved arguments or the model rule them out.

    Raises:
        ConfigError: for attention that cannot read host memory, prompts in one piece, embeddings,
            sliding windows, and on CUDA for MLA in chunks that are too large.
    """
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.configs.model_config import AttentionArch, is_deepseek_dsa

    model = model_config_of(args)
    backends = {args.attention_backend, args.prefill_attention_backend}
    others = (backends | {args.decode_attention_backend}) - {None, *NAMES}
    _refuse_any(
        "--smg-stream-context cannot be combined with {}; start without it.",
        [
            (others, f"attention backend {', '.join(sorted(others))}"),
            ((args.chunked_prefill_size or 0) <= 0, "prompts that are not computed in chunks"),
            (args.is_embedding, "embedding models"),
            (_has_windows(model.hf_text_config), "models with sliding-window layers"),
            (is_deepseek_dsa(model.hf_config), "models with sparse attention"),
        ],
    )
    if model.attention_arch == AttentionArch.MLA and device_kind(args) == "cuda":
        _refuse_chunks(args.chunked_prefill_size, model.num_attention_heads // args.tp_size)


def _refuse_chunks(tokens: int, heads: int) -> None:
    """FlashInfer would refuse them when they come (`_FA_MAX_WORK_ITEMS`: tiles of 128 rows, and it
    adds some where it splits keys), and the worker would end."""
    most = LATENT_ROWS // heads
    if tokens > most:
        raise ConfigError(
            "--smg-stream-context on CUDA computes prompts of this model (MLA, "
            f"{heads} heads a rank) in chunks of at most {most} tokens, but "
            f"--chunked-prefill-size is {tokens}"
        )


def _has_windows(config: Any) -> bool:
    """Whether a model's configuration has layers with a sliding window."""
    kinds = getattr(config, "layer_types", None) or ()
    return "sliding_attention" in kinds or (
        bool(getattr(config, "sliding_window", None))
        and getattr(config, "use_sliding_window", True) is not False
    )


def refuse_model(server_args: ServerArgs) -> None:
    """Refuse a model whose state is more than KV pages, before any process is started.

    Raises:
        ConfigError: for what `refuse_streams` and `refuse_beside_ends` refuse.
    """
    if chosen(server_args).stream_context:
        refuse_streams(server_args)
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.mem_cache.kv_cache_builder import uses_ssm_state

    model = model_config_of(server_args)
    if uses_ssm_state(model):
        refuse_beside_ends(server_args, "Mamba or linear-attention layers")
    elif model.is_hybrid_swa:
        refuse_beside_ends(server_args, "sliding-window layers")


def refuse_beside_ends(args: ServerArgs, layers: str) -> None:
    """Refuse what does not know yet of layers that need only the end of a prefix.

    Raises:
        ConfigError: one sentence that says what to drop.
    """
    config = chosen(args)
    states = layers.startswith("Mamba")
    conflicts = [
        (states and config.stream_context, "--smg-stream-context"),
        # What a prefill worker hands over ends with a prompt, where no state is kept.
        (states and config.workers, "--smg-prefill-workers and --smg-decode-workers"),
        (config.write_policy is WritePolicy.WRITE_BACK, "--smg-write-policy write_back"),
        (config.prefetch, "--smg-prefetch"),
        (config.storage is not None, "--smg-storage"),
    ]
    for found, flag in conflicts:
        if found:
            raise ConfigError(
                f"models with {layers} cannot be served with {flag} yet; leave it out."
            )
