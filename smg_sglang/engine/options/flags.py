"""The `--smg-*` flags: how they are parsed, and what they set in SGLang's own arguments."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from smg_sglang import TESTED_SGLANG
from smg_sglang.config import (
    DEFAULT_EVICTION,
    DEFAULT_SPLIT_TOKENS,
    EvictionName,
    SmgConfig,
    WritePolicy,
    make_config,
)
from smg_sglang.engine.options import names as attention_names
from smg_sglang.errors import ConfigError

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

DEFAULT_PAGE_SIZE = 16
#: SGLang's `--mem-fraction-static` on a CPU, where nobody has said how large the pool should be.
CPU_MEM_FRACTION = 0.5
#: Where a record of arguments carries our choice: an underscored attribute survives SGLang's
#: resolution and its pickling to the workers (`ServerArgs.__reduce__`).
ATTRIBUTE = "_smg"

#: Query tokens times heads, of a chunk of a model with latents (MLA) that is streamed on CUDA.
LATENT_ROWS = 1 << 20

#: argparse destination -> `make_config` argument
_FIELDS = {
    "smg_host_gb": "host_gb",
    "smg_write_policy": "write_policy",
    "smg_memory": "memory_address",
    "smg_eviction_policy": "eviction_policy",
    "smg_page_size": "page_size",
    "smg_lookup_timeout_ms": "lookup_timeout_ms",
    "smg_prefill_workers": "prefill_workers",
    "smg_decode_workers": "decode_workers",
    "smg_prefill_devices": "prefill_devices",
    "smg_decode_devices": "decode_devices",
    "smg_split_tokens": "split_tokens",
    "smg_stream_context": "stream_context",
    "smg_prefetch": "prefetch",
    "smg_allow_untested_sglang": "allow_untested_sglang",
}


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    """Add our group to SGLang's parser. All flags exist also where the feature is off."""
    group = parser.add_argument_group(
        "smg: KV cache in host memory (smg_sglang)",
        "A prefix that leaves the device lives on in host memory and is loaded back when it is "
        "needed again.",
    )
    add = group.add_argument
    add("--enable-smg", action="store_true", help="Keep prefixes in host memory. (default: off)")
    add(
        "--smg-host-gb",
        type=float,
        metavar="GIB",
        help="Host memory for KV pages, in GiB. (default: half of the memory that is free at "
        "start on a GPU machine, a quarter on a CPU one; container limits count; it is printed)",
    )
    add(
        "--smg-write-policy",
        choices=[policy.value for policy in WritePolicy],
        help="When a prefix is copied to host memory: as soon as it is computed, on its second "
        "use, or when the device evicts it. (default: write_through)",
    )
    add(
        "--smg-eviction-policy",
        choices=[policy.value for policy in EvictionName],
        help="Which host pages go first when memory is full: the least recently used, the least "
        "often used, the oldest, those not used again, or the cheapest to compute again for their "
        f"age. (default: {DEFAULT_EVICTION})",
    )
    add(
        "--smg-memory",
        metavar="ADDRESS",
        help="Attach to the memory server at ipc:///DIRECTORY, started with `python -m "
        "smg_sglang memory`, instead of starting one. Servers with the same model share its "
        "prefixes. (default: start one, and stop it with the server)",
    )
    add(
        "--smg-page-size",
        type=int,
        metavar="TOKENS",
        help="Tokens a page, a power of two from 1 to 128, used where --page-size is not given. "
        f"(default: {DEFAULT_PAGE_SIZE})",
    )
    add(
        "--smg-lookup-timeout-ms",
        type=float,
        metavar="MS",
        help="The longest that scheduling waits for the memory server, in milliseconds; later "
        "than that is a miss. (default: 20)",
    )
    _add_split_args(add)
    add(
        "--smg-stream-context",
        action="store_true",
        help="Let a prompt be longer than the device's KV pool, up to host memory and the model's "
        "own limit: old pages stay in host memory and are attended from there. (default: off)",
    )
    add(
        "--smg-prefetch",
        action="store_true",
        help="Load the host pages of requests that wait while the device has room. (default: off, "
        "they are loaded layer by layer when the request is admitted)",
    )
    add(
        "--smg-allow-untested-sglang",
        action="store_true",
        help=f"Try an SGLang other than {', '.join(TESTED_SGLANG)}. (default: refuse)",
    )


def _add_split_args(add: Callable[..., Any]) -> None:
    add(
        "--smg-prefill-workers",
        type=int,
        metavar="P",
        help="Compute long prompts in P workers of their own, so that they do not stall the "
        "tokens of others. (default: no split; 1 where --smg-decode-workers is given)",
    )
    add(
        "--smg-decode-workers",
        type=int,
        metavar="D",
        help="Workers that generate, and compute short prompts. (default: no split; 1 where "
        "--smg-prefill-workers is given)",
    )
    for role in ("prefill", "decode"):
        add(
            f"--smg-{role}-devices",
            metavar="DEVICES",
            help=f"CUDA devices of the {role} workers, such as cuda:0,cuda:1; one for all, or one "
            "each. (default: devices of their own, or all share the first where there are too few)",
        )
    add(
        "--smg-split-tokens",
        type=int,
        metavar="TOKENS",
        help="Prompt tokens not known to be cached from which a request goes through a prefill "
        f"worker. (default: {DEFAULT_SPLIT_TOKENS['cuda']}; "
        f"{DEFAULT_SPLIT_TOKENS['cpu']} on a CPU)",
    )


def configure_from_cli(server_args: ServerArgs, args: argparse.Namespace) -> None:
    """Apply the parsed flags; a wrong one ends the process with one sentence and code 2."""
    given = {name: getattr(args, dest, None) for dest, name in _FIELDS.items()}
    given = {name: v for name, v in given.items() if v is not None and v is not False}
    if not getattr(args, "enable_smg", False):
        if given:
            dests = [dest for dest, name in _FIELDS.items() if name in given]
            flag = "--" + dests[0].replace("_", "-")
            refuse(ConfigError(f"{flag} needs --enable-smg; add it."))
        return
    try:
        configure(server_args, given, origin="cli")
    except ConfigError as error:
        refuse(error)


def refuse(error: ConfigError) -> NoReturn:
    """End a command line with the one sentence that says what to change."""
    print(f"smg: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def split_kwargs(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Split Engine keyword arguments into SGLang's and ours (None where the flag is off).

    Raises:
        ConfigError: an unknown `smg_*` name, or one without `enable_smg`.
    """
    ours = {k: v for k, v in kwargs.items() if k == "enable_smg" or k.startswith("smg_")}
    theirs = {k: v for k, v in kwargs.items() if k not in ours}
    enabled = ours.pop("enable_smg", False)
    unknown = sorted(ours.keys() - _FIELDS.keys())
    if unknown:
        raise ConfigError(f"unknown argument {unknown[0]!r}; there are: {', '.join(_FIELDS)}.")
    if not enabled:
        if ours:
            raise ConfigError(f"{min(ours)} needs enable_smg=True; add it.")
        return theirs, None
    return theirs, {_FIELDS[name]: value for name, value in ours.items() if value is not None}


def configure(server_args: ServerArgs, given: Mapping[str, Any], origin: str) -> SmgConfig:
    """Check everything that can be checked before anything starts, then set SGLang's fields.

    Called in the main process before SGLang resolves its arguments.

    Raises:
        ConfigError: one sentence that says what to change.
    """
    given = dict(given)
    given.setdefault("page_size", server_args.page_size or DEFAULT_PAGE_SIZE)
    config = make_config(**given, device=_device_kind(server_args))
    _refuse_untested_sglang(config)
    _refuse_flags(server_args)
    if server_args.page_size is None:
        server_args.page_size = config.page_size
    _leave_room(server_args, config)
    if config.workers:
        _refuse_beside_split(server_args)
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
        _refuse_beside_streams(server_args)
        if _device_kind(server_args) == "cuda":
            _prepare_cuda_streams(server_args)
    setattr(server_args, ATTRIBUTE, {"origin": origin, "config": config.to_builtins()})
    return config


def _leave_room(server_args: ServerArgs, config: SmgConfig) -> None:
    """On a CPU the device pool and the host tier come out of the same DRAM; SGLang would take
    nearly all of it for the pool."""
    chosen = server_args.mem_fraction_static is not None or server_args.max_total_tokens is not None
    if _device_kind(server_args) == "cpu" and config.host_gb is not None and not chosen:
        server_args.mem_fraction_static = CPU_MEM_FRACTION


def is_enabled(server_args: Any) -> bool:
    """Whether this record of arguments asked for the host tier."""
    return getattr(server_args, ATTRIBUTE, None) is not None


def chosen(server_args: Any) -> dict[str, Any]:
    """The configuration this record of arguments carries; empty without the host tier."""
    config: dict[str, Any] = (getattr(server_args, ATTRIBUTE, None) or {}).get("config", {})
    return config


def _device_kind(server_args: ServerArgs) -> str:
    if server_args.device is not None:
        return str(server_args.device).split(":", 1)[0]
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _refuse_untested_sglang(config: SmgConfig) -> None:
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


def _refuse_flags(args: ServerArgs) -> None:
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
            (args.disaggregation_mode not in (None, "null"), "--disaggregation-mode"),
            (args.speculative_algorithm is not None, "--speculative-algorithm"),
            # It unmaps the pool while pages may be on their way.
            (args.enable_memory_saver, "--enable-memory-saver"),
            # Its loop never asks which copies have ended.
            (args.enable_pdmux, "--enable-pdmux"),
        ],
    )


def _refuse_beside_split(args: ServerArgs) -> None:
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


def _refuse_beside_streams(args: ServerArgs) -> None:
    """Refuse what cannot be combined with contexts that are streamed from host memory."""
    attention = args.attention_backend
    _refuse_any(
        "--smg-stream-context cannot be combined with {}; drop one of the two.",
        [
            (attention not in (None, *attention_names.NAMES), f"--attention-backend {attention}"),
            (args.allow_auto_truncate, "--allow-auto-truncate"),
            (args.dllm_algorithm is not None, "--dllm-algorithm"),
            # Its ranks compute batches together: a stream in one would need graphs off in all.
            (args.enable_dp_attention, "--enable-dp-attention"),
        ],
    )


def _prepare_cuda_streams(args: ServerArgs) -> None:
    """Choose our attention backend, and refuse what it has no kernels for."""
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
    args.attention_backend = attention_names.NAME
    logger.warning(
        "--smg-stream-context on CUDA was written and checked without a GPU and has never run on "
        "one: compare its answers with those of a server without it before you rely on it."
    )


def refuse_streams(args: ServerArgs) -> None:
    """Refuse contexts from host memory where resolved arguments or the model rule them out.

    Raises:
        ConfigError: for attention that cannot read host memory, prompts in one piece, embeddings,
            sliding windows, and on CUDA for MLA in chunks that are too large.
    """
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.configs.model_config import AttentionArch

    model = model_config_of(args)
    backends = {args.attention_backend, args.prefill_attention_backend}
    others = (backends | {args.decode_attention_backend}) - {None, *attention_names.NAMES}
    _refuse_any(
        "--smg-stream-context cannot be combined with {}; start without it.",
        [
            (others, f"attention backend {', '.join(sorted(others))}"),
            ((args.chunked_prefill_size or 0) <= 0, "prompts that are not computed in chunks"),
            (args.is_embedding, "embedding models"),
            (_has_windows(model.hf_text_config), "models with sliding-window layers"),
        ],
    )
    if model.attention_arch == AttentionArch.MLA and _device_kind(args) == "cuda":
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
        ConfigError: for sliding-window and Mamba hybrids, and for what `refuse_streams` refuses.
    """
    if chosen(server_args).get("stream_context"):
        refuse_streams(server_args)
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.mem_cache.kv_cache_builder import uses_ssm_state

    model = model_config_of(server_args)
    if model.is_hybrid_swa:
        kind = "sliding-window"
    elif uses_ssm_state(model):
        kind = "Mamba and linear-attention"
    else:
        return
    raise ConfigError(
        f"{kind} hybrid models ({', '.join(model.hf_config.architectures)}) are not supported "
        "by --enable-smg yet; start without it."
    )
