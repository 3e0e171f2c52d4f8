"""What an operator can choose: each choice is declared here, once.

Command line, environment, Engine arguments, `/server_info` and the README's table derive from it
(`smg_sglang.config.flags`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from smg_sglang import TESTED_SGLANG
from smg_sglang.config.option import option, options_of
from smg_sglang.config.policies import (
    DEFAULT_EVICTION,
    DEFAULT_HINT_SHARE,
    DEFAULT_SPLIT_TOKENS,
    MAX_PAGE_SIZE,
    MIN_HOST_GB,
    EvictionName,
    HostDtype,
    StorageName,
    WritePolicy,
)


@dataclass(frozen=True, kw_only=True)
class SmgConfig:
    """The validated choice of an operator. Times in milliseconds, sizes in GiB.

    `host_gb`, `eviction_policy`, `hint_share` and `storage` are None when the memory server is
    somebody else's (`memory_address`).
    `decode_workers` is 0 where one worker does both phases.
    """

    host_gb: float | None = option(
        None,
        "Host memory for KV pages, in GiB, of all ranks together; printed at start",
        "half of what is free at start on a GPU machine, a quarter on a CPU one; container limits "
        "count",
        metavar="GIB",
        least=MIN_HOST_GB,
        unit="GiB",
        memory=True,
    )
    write_policy: WritePolicy = option(
        WritePolicy.WRITE_THROUGH,
        "Copy a prefix to host memory as soon as it is computed (write_through), on its second use "
        "(selective), or when the device evicts it (write_back)",
    )
    memory_address: str | None = option(
        None,
        "Attach to the memory server at ipc:///DIRECTORY, started with `python -m smg_sglang "
        "memory`; servers with the same model share its prefixes",
        "start one, and stop it with the server",
        name="memory",
        metavar="ADDRESS",
    )
    eviction_policy: EvictionName | None = option(
        None,
        "Which host pages go first when memory is full: the least recently used (lru), the least "
        "often used (lfu), the oldest (fifo), those not used again (slru), or the cheapest to "
        "compute again for their age (cost)",
        DEFAULT_EVICTION.value,
        memory=True,
    )
    hint_share: float | None = option(
        None,
        "The share of host memory that one tenant's hints may retain (docs/hints.md); beyond it "
        "hints are refused; 0: nothing is retained",
        f"{DEFAULT_HINT_SHARE:g}",
        metavar="SHARE",
        least=0,
        most=1,
        memory=True,
    )
    storage: StorageName | None = option(
        None,
        "Keep pages in storage too, by SGLang's backend of that name: what host memory evicts, and "
        "what a machine had before it restarted, is found again (docs/storage.md)",
        "none",
        memory=True,
    )
    storage_config: str | None = option(
        None,
        "Settings of that backend as SGLang knows them, a JSON object; for file at least "
        '{"file_storage_path": "/DIRECTORY"}, and "max_size" for a limit in bytes',
        "none",
        metavar="JSON",
        memory=True,
    )
    storage_wait_ms: float = option(
        500.0,
        "The longest that a request waits for storage to bring its prefix to host memory, in "
        "milliseconds; what is late is computed",
        metavar="MS",
        above=0,
        most=60_000,
        unit="milliseconds",
    )
    page_size: int = option(
        16,
        f"Tokens a page, a power of two from 1 to {MAX_PAGE_SIZE}, where --page-size is not given",
        metavar="TOKENS",
    )
    host_dtype: HostDtype = option(
        HostDtype.AUTO,
        "Keep KV in host memory as the device stores it (auto), or rounded to fp8 with a scale a "
        "head: nearly twice the pages, and answers after a host hit may differ",
    )
    lookup_timeout_ms: float = option(
        20.0,
        "The longest that scheduling waits for the memory server, in milliseconds; later than that "
        "is a miss",
        metavar="MS",
        above=0,
        most=10_000,
        unit="milliseconds",
    )
    prefill_workers: int = option(
        0,
        "Compute long prompts in P workers of their own, so that they do not stall the tokens of "
        "others",
        "no split; 1 where --smg-decode-workers is given",
        metavar="P",
        least=0,
    )
    decode_workers: int = option(
        0,
        "Workers that generate, and compute short prompts",
        "no split; 1 where --smg-prefill-workers is given",
        metavar="D",
        least=1,
    )
    prefill_devices: str | None = option(
        None,
        "CUDA devices of the prefill workers, such as cuda:0,cuda:1; one for all, or one each",
        "devices of their own, or all share the first where there are too few",
        metavar="DEVICES",
        split=True,
    )
    decode_devices: str | None = option(
        None,
        "CUDA devices of the decode workers, likewise",
        "likewise",
        metavar="DEVICES",
        split=True,
    )
    split_tokens: int = option(
        DEFAULT_SPLIT_TOKENS["cpu"],
        "Prompt tokens not known to be cached from which a request goes through a prefill worker",
        f"{DEFAULT_SPLIT_TOKENS['cuda']}; {DEFAULT_SPLIT_TOKENS['cpu']} on a CPU",
        metavar="TOKENS",
        least=1,
        split=True,
    )
    stream_context: bool = option(
        False,
        "Let a prompt be longer than the device's KV pool, up to host memory and the model's own "
        "limit: old pages stay in host memory and are attended from there",
    )
    prefetch: bool = option(
        False,
        "Load the host pages of requests that wait while the device has room, not layer by layer "
        "when they are admitted",
    )
    wait_steps: int = option(
        8,
        "Steps of the scheduler that a request waits for more of a prefix that another one is "
        "computing, before it computes that itself; 0: it never waits",
        metavar="STEPS",
        least=0,
    )
    allow_untested_sglang: bool = option(
        False, f"Try an SGLang other than {', '.join(TESTED_SGLANG)}", "refuse"
    )

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


OPTIONS = options_of(SmgConfig)
"""By field of `SmgConfig`."""
