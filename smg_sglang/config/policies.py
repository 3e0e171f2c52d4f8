"""Policies that can be chosen, and limits and defaults of what can."""

from __future__ import annotations

from enum import StrEnum

#: The share of the memory that is free at start which the host tier takes by default. On a CPU
#: the device pool and the weights come out of the same DRAM, hence the smaller share.
DEFAULT_SHARE = {"cuda": 0.5, "cpu": 0.25}
#: The share of host memory that hints of one tenant may keep from being evicted.
DEFAULT_HINT_SHARE = 0.5
MIN_HOST_GB = 0.0625
MAX_PAGE_SIZE = 128
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


class HostDtype(StrEnum):
    """What host memory keeps of a number.

    auto: its bytes. fp8: e4m3, with a scale a head and token; half of bfloat16's bytes.
    """

    AUTO = "auto"
    FP8 = "fp8"


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


class StorageName(StrEnum):
    """SGLang's storage backends that were tried (`docs/storage.md`).

    file: a file a page. mooncake: Mooncake Store, shared by machines. dynamic: a class that the
    configuration names.
    """

    FILE = "file"
    MOONCAKE = "mooncake"
    DYNAMIC = "dynamic"


#: Device pages that may wait for their copy to host memory, as a share of the device pool. Their
#: slots are locked until then; beyond it, prefixes stay on the device only.
MAX_WAITING_SHARE = 0.5
