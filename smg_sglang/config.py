"""What an operator can choose, with its defaults."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

import msgspec

from smg_sglang.box import GIB, box_memory
from smg_sglang.errors import ConfigError

#: The share of the memory that is free at start which the host tier takes by default. On a CPU
#: the device pool and the weights come out of the same DRAM, hence the smaller share.
DEFAULT_SHARE = {"cuda": 0.5, "cpu": 0.25}
MIN_HOST_GB = 0.0625
MAX_PAGE_SIZE = 128
MAX_ADDRESS_BYTES = 107 - len("/control")
#: A prompt with fewer new tokens than this is computed by the decode worker itself. Measured on a
#: CPU (`docs/split.md`): there a hand-off costs as much as 64 tokens do. On a GPU, where tokens are
#: cheaper beside a step, an estimate.
DEFAULT_SPLIT_TOKENS = {"cpu": 128, "cuda": 512}


class WritePolicy(StrEnum):
    """When a prefix is copied to host memory.

    write_through: as soon as it is computed; eviction from the device is then free.
    selective: when it is used a second time.
    write_back: only when it is evicted from the device.
    """

    WRITE_THROUGH = "write_through"
    SELECTIVE = "selective"
    WRITE_BACK = "write_back"

    @property
    def uses_before_spill(self) -> int:
        """How many requests insert a prefix before it is copied; out of reach for write-back,
        which copies on eviction."""
        return _USES_BEFORE_SPILL[self]


_USES_BEFORE_SPILL = {
    WritePolicy.WRITE_THROUGH: 1,
    WritePolicy.SELECTIVE: 2,
    WritePolicy.WRITE_BACK: 1 << 30,
}


class EvictionName(StrEnum):
    """Which host pages go first when memory is full (`smg_sglang/tree/eviction.py`).

    lru: least recently used. lfu: least often used. fifo: oldest. slru: not used again since they
    came, then least recently used. cost: cheapest to compute again for their age.
    """

    LRU = "lru"
    LFU = "lfu"
    FIFO = "fifo"
    SLRU = "slru"
    COST = "cost"


#: The best on the traces in `docs/simulator.md`, which has the table.
DEFAULT_EVICTION = EvictionName.COST

#: Device pages that may wait for their copy to host memory, as a share of the device pool. Their
#: slots are locked until then; beyond it, prefixes stay on the device only.
MAX_WAITING_SHARE = 0.5


class SmgConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The validated choice of an operator. Times in milliseconds, sizes in GiB.

    `host_gb` and `eviction_policy` are None when the memory server is somebody else's
    (`memory_address`).
    `decode_workers` is 0 where one worker does both phases.
    """

    host_gb: float | None = None
    write_policy: WritePolicy = WritePolicy.WRITE_THROUGH
    memory_address: str | None = None
    eviction_policy: EvictionName | None = None
    page_size: int = 16
    lookup_timeout_ms: float = 20.0
    prefill_workers: int = 0
    decode_workers: int = 0
    prefill_devices: str | None = None
    decode_devices: str | None = None
    split_tokens: int = DEFAULT_SPLIT_TOKENS["cpu"]
    stream_context: bool = False
    prefetch: bool = False
    allow_untested_sglang: bool = False

    @property
    def workers(self) -> int:
        """Workers behind a phase controller; 0 without one."""
        total = self.prefill_workers + self.decode_workers
        return total if total > 1 else 0

    @classmethod
    def from_builtins(cls, values: dict[str, Any]) -> SmgConfig:
        """The inverse of `to_builtins`."""
        return msgspec.convert(values, cls)

    def to_builtins(self) -> dict[str, Any]:
        """Plain values, as shown by `/server_info` and handed to the workers."""
        result: dict[str, Any] = msgspec.to_builtins(self)
        return result


def make_config(
    *,
    host_gb: float | None = None,
    write_policy: str = WritePolicy.WRITE_THROUGH,
    memory_address: str | None = None,
    eviction_policy: str | None = None,
    page_size: int = 16,
    lookup_timeout_ms: float = 20.0,
    prefill_workers: int | None = None,
    decode_workers: int | None = None,
    prefill_devices: str | None = None,
    decode_devices: str | None = None,
    split_tokens: int | None = None,
    stream_context: bool = False,
    prefetch: bool = False,
    allow_untested_sglang: bool = False,
    device: str = "cpu",
) -> SmgConfig:
    """Check every value and fill in the default host size.

    Raises:
        ConfigError: one sentence that says which flag to change.
    """
    if write_policy not in list(WritePolicy):
        raise ConfigError(
            f"--smg-write-policy must be one of {', '.join(WritePolicy)}, not {write_policy!r}."
        )
    if not 1 <= page_size <= MAX_PAGE_SIZE or page_size & (page_size - 1):
        raise ConfigError(
            f"--smg-page-size (or --page-size) must be a power of two from 1 to "
            f"{MAX_PAGE_SIZE} tokens, not {page_size}."
        )
    if not 0 < lookup_timeout_ms <= 10_000:
        raise ConfigError(
            "--smg-lookup-timeout-ms must be above 0 and at most 10000 milliseconds, "
            f"not {lookup_timeout_ms:g}."
        )
    if memory_address is not None:
        if host_gb is not None:
            raise ConfigError(
                "--smg-host-gb sizes a memory server of this server's own; leave it out with "
                "--smg-memory, and give --host-gb to `python -m smg_sglang memory` instead."
            )
        if eviction_policy is not None:
            raise ConfigError(
                "--smg-eviction-policy is for a memory server of this server's own; leave it out "
                "with --smg-memory, and give --eviction-policy to `python -m smg_sglang memory`."
            )
        memory_address, eviction = check_address(memory_address), None
    else:
        host_gb = check_host_gb(host_gb, device)
        eviction = check_eviction(eviction_policy or DEFAULT_EVICTION)
    split = {
        "prefill_devices": prefill_devices,
        "decode_devices": decode_devices,
        "split_tokens": split_tokens,
    }
    prefill_workers, decode_workers = check_split(
        prefill_workers, decode_workers, split, write_policy
    )
    check_stream_context(stream_context, prefill_workers + decode_workers, device)
    return SmgConfig(
        host_gb=host_gb,
        write_policy=WritePolicy(write_policy),
        memory_address=memory_address,
        eviction_policy=eviction,
        page_size=page_size,
        lookup_timeout_ms=lookup_timeout_ms,
        prefill_workers=prefill_workers,
        decode_workers=decode_workers,
        prefill_devices=prefill_devices,
        decode_devices=decode_devices,
        split_tokens=split_tokens or DEFAULT_SPLIT_TOKENS.get(device, DEFAULT_SPLIT_TOKENS["cuda"]),
        stream_context=stream_context,
        prefetch=prefetch,
        allow_untested_sglang=allow_untested_sglang,
    )


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


def check_split(
    prefill: int | None, decode: int | None, needs_it: Mapping[str, Any], write_policy: str
) -> tuple[int, int]:
    """(prefill workers, decode workers); (0, 0) where neither was asked for, and one was if the
    other was."""
    if prefill is None and decode is None:
        for name, value in needs_it.items():
            if value is not None:
                flag = "--smg-" + name.replace("_", "-")
                raise ConfigError(f"{flag} needs --smg-prefill-workers; add it.")
        return 0, 0
    prefill = 1 if prefill is None else prefill
    decode = 1 if decode is None else decode
    if prefill < 0:
        raise ConfigError(f"--smg-prefill-workers must be 0 or more, not {prefill}.")
    if decode < 1:
        raise ConfigError(f"--smg-decode-workers must be at least 1, not {decode}.")
    tokens = needs_it["split_tokens"]
    if tokens is not None and tokens < 1:
        raise ConfigError(f"--smg-split-tokens must be at least 1 token, not {tokens}.")
    if prefill and write_policy != WritePolicy.WRITE_THROUGH:
        raise ConfigError(
            "prompts are handed from prefill to decode workers as soon as they are computed; "
            "drop --smg-write-policy, or the prefill workers."
        )
    return prefill, decode


def check_eviction(name: str) -> EvictionName:
    """The policy of that name."""
    if name not in list(EvictionName):
        raise ConfigError(
            f"--smg-eviction-policy must be one of {', '.join(EvictionName)}, not {name!r}."
        )
    return EvictionName(name)


def check_address(address: str) -> str:
    """The directory of a memory server's sockets, given as `ipc://DIR` or `DIR`."""
    directory = address.removeprefix("ipc://")
    if "://" in directory or not directory.startswith("/"):
        raise ConfigError(
            f"--smg-memory must be ipc:///DIRECTORY or an absolute directory, not {address!r}."
        )
    # sun_path holds 107 bytes, and the longest name in the directory is "/control".
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
    if not host_gb >= MIN_HOST_GB:  # also refuses NaN
        raise ConfigError(f"--smg-host-gb must be at least {MIN_HOST_GB} GiB, not {host_gb:g}.")
    if host_gb > available:
        raise ConfigError(
            f"--smg-host-gb {host_gb:g} is more than the {available:.1f} GiB that are free on "
            "this machine (or in this container); choose a smaller size."
        )
    return host_gb


def _read_bool(text: str) -> bool:
    return text.lower() in ("1", "true")


def config_from_env() -> dict[str, Any] | None:
    """`make_config` arguments from SMG_* variables, for programs that build SGLang's Engine.

    None unless SMG_ENABLE is 1. The names are those of the flags: SMG_HOST_GB for --smg-host-gb.
    """
    if os.environ.get("SMG_ENABLE", "0").lower() not in ("1", "true"):
        return None
    readers: dict[str, Callable[[str], Any]] = {
        "host_gb": float,
        "write_policy": str,
        "eviction_policy": str,
        "memory_address": str,
        "page_size": int,
        "lookup_timeout_ms": float,
        "prefill_workers": int,
        "decode_workers": int,
        "prefill_devices": str,
        "decode_devices": str,
        "split_tokens": int,
        "stream_context": _read_bool,
        "prefetch": _read_bool,
        "allow_untested_sglang": _read_bool,
    }
    names = {"memory_address": "SMG_MEMORY"}
    found: dict[str, Any] = {}
    for field, read in readers.items():
        name = names.get(field, f"SMG_{field.upper()}")
        if (text := os.environ.get(name)) is not None:
            try:
                found[field] = read(text)
            except ValueError:
                raise ConfigError(f"{name} must be a number, not {text!r}.") from None
    return found
