"""From what was given to a choice that holds, or a sentence that says what to change."""

from __future__ import annotations

import os
from typing import Any

from smg_sglang.box import GIB, box_memory
from smg_sglang.config.choices import OPTIONS, SmgConfig
from smg_sglang.config.policies import (
    DEFAULT_EVICTION,
    DEFAULT_HINT_SHARE,
    DEFAULT_SHARE,
    DEFAULT_SPLIT_TOKENS,
    MAX_PAGE_SIZE,
    MIN_HOST_GB,
    HostDtype,
    WritePolicy,
)
from smg_sglang.config.storage import storage_settings
from smg_sglang.errors import ConfigError

#: What sun_path holds, less the longest name in the directory.
MAX_ADDRESS_BYTES = 107 - len("/control")


_STORAGE = ("storage", "storage_config")


def make_config(*, device: str = "cpu", **given: Any) -> SmgConfig:
    """Check every value, and fill in what depends on the machine.

    Args:
        given: fields of `SmgConfig`; None is as good as none.

    Raises:
        ConfigError: one sentence that says which flag to change.
    """
    chosen = {name: OPTIONS[name].read(v) for name, v in given.items() if v is not None}
    _check_page_size(chosen.get("page_size", SmgConfig.page_size))
    chosen |= _memory_choice(chosen, device) | _split_choice(chosen, device)
    config = SmgConfig(**chosen)
    check_stream_context(config.stream_context, config.workers, device)
    if config.stream_context and config.host_dtype is not HostDtype.AUTO:
        raise ConfigError(
            "--smg-stream-context attends host memory as it lies, not as --smg-host-dtype fp8 "
            "keeps it; drop one of the two."
        )
    return config


def _check_page_size(page_size: int) -> None:
    if not 1 <= page_size <= MAX_PAGE_SIZE or page_size & (page_size - 1):
        raise ConfigError(
            f"--smg-page-size (or --page-size) must be a power of two from 1 to "
            f"{MAX_PAGE_SIZE} tokens, not {page_size}."
        )


def _memory_choice(chosen: dict[str, Any], device: str) -> dict[str, Any]:
    """Whose memory server, and what it is like where it is this server's own."""
    if "memory_address" not in chosen:
        return {
            "host_gb": check_host_gb(chosen.get("host_gb"), device),
            "eviction_policy": chosen.get("eviction_policy", DEFAULT_EVICTION),
            "hint_share": chosen.get("hint_share", DEFAULT_HINT_SHARE),
            **_storage_choice(chosen),
        }
    for field, option in OPTIONS.items():
        if option.memory and field in chosen:
            theirs = "--" + option.flag.removeprefix("--smg-")
            raise ConfigError(
                f"{option.flag} is for a memory server of this server's own; leave it out with "
                f"--smg-memory, and give {theirs} to `python -m smg_sglang memory` instead."
            )
    return {"memory_address": check_address(chosen["memory_address"])}


def _storage_choice(chosen: dict[str, Any]) -> dict[str, Any]:
    """Where pages go below host memory; whether that can be is seen before anything starts."""
    given = {name: value for name, value in chosen.items() if name in _STORAGE}
    if "storage" in given:
        storage_settings(given["storage"], given.get("storage_config"))
    elif given:
        raise ConfigError("--smg-storage-config needs --smg-storage; add it.")
    return given


def _split_choice(chosen: dict[str, Any], device: str) -> dict[str, Any]:
    """How many workers of each kind: none where neither was asked for, one if the other was."""
    default = DEFAULT_SPLIT_TOKENS.get(device, DEFAULT_SPLIT_TOKENS["cuda"])
    found = {"split_tokens": chosen.get("split_tokens", default)}
    if "prefill_workers" not in chosen and "decode_workers" not in chosen:
        for field, option in OPTIONS.items():
            if option.split and field in chosen:
                raise ConfigError(f"{option.flag} needs --smg-prefill-workers; add it.")
        return found
    found["prefill_workers"] = chosen.get("prefill_workers", 1)
    found["decode_workers"] = chosen.get("decode_workers", 1)
    policy = chosen.get("write_policy", SmgConfig.write_policy)
    if found["prefill_workers"] and policy is not WritePolicy.WRITE_THROUGH:
        raise ConfigError(
            "prompts are handed from prefill to decode workers as soon as they are computed; "
            "drop --smg-write-policy, or the prefill workers."
        )
    return found


def check_stream_context(wanted: bool, split_workers: int, device: str) -> None:
    """Refuse `--smg-stream-context` where it does not work yet."""
    if wanted and device not in ("cpu", "cuda"):
        raise ConfigError(
            f"--smg-stream-context works on a CPU and on CUDA, not on {device}; leave it out."
        )
    if wanted and split_workers:
        raise ConfigError(
            "--smg-stream-context cannot be combined with --smg-prefill-workers and "
            "--smg-decode-workers yet; drop one of the two."
        )


def check_address(address: str) -> str:
    """The directory of a memory server's sockets, given as `ipc://DIR` or `DIR`."""
    directory = address.removeprefix("ipc://")
    if "://" in directory or not directory.startswith("/"):
        raise ConfigError(
            f"--smg-memory must be ipc:///DIRECTORY or an absolute directory, not {address!r}."
        )
    if len(os.fsencode(directory)) > MAX_ADDRESS_BYTES:
        raise ConfigError(
            f"--smg-memory is longer than the {MAX_ADDRESS_BYTES} bytes that a socket's path "
            f"may have: choose a shorter directory than {directory!r}."
        )
    return directory


def check_host_gb(host_gb: float | None, device: str) -> float:
    """The size of an embedded memory server in GiB: as asked for, or the default share."""
    available = box_memory().available / GIB
    if host_gb is None:
        host_gb = round(available * DEFAULT_SHARE.get(device, 0.25), 2)
        if host_gb < MIN_HOST_GB:
            raise ConfigError(
                f"only {available:.2f} GiB of memory is free, too little for a host tier; "
                "free some, or start without --enable-smg."
            )
        return host_gb
    if host_gb > available:
        raise ConfigError(
            f"--smg-host-gb {host_gb:g} is more than the {available:.1f} GiB that are free on "
            "this machine (or in this container); choose a smaller size."
        )
    return host_gb
