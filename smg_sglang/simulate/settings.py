"""What a simulated server is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from smg_sglang.box import GIB
from smg_sglang.config import DEFAULT_EVICTION, EvictionName, SmgConfig, WritePolicy
from smg_sglang.simulate.model import ModelCost
from smg_sglang.simulate.options import above_0, count, from_0, gib, page_size, write_policy
from smg_sglang.trace.request import Request


def _flag(
    value: Any, metavar: str, read: Callable[[str], Any], text: str, default: str | None = None
) -> Any:
    """A field that `python -m smg_sglang simulate` has a flag for, of its name; see `flags`."""
    if default is None:
        default = f"{value:g}" if isinstance(value, float) else str(value)
    told = {"metavar": metavar, "type": read, "help": f"{text} (default: {default})"}
    return field(default=value, metadata=told)


@dataclass(frozen=True)
class Settings:
    """A server and its machine. Each choice is declared here, once.

    Attributes:
        tflops: what the device does in prefill, in 10^12 FLOP/s.
        link_gbps: between device and host memory, each way, in 10^9 bytes/s.
        closed: one request after another, whatever their timestamps.
    """

    model: ModelCost
    device_tokens: int = _flag(
        0, "N", count, "the server's --max-total-tokens", "none, it is needed"
    )
    host_gb: float = _flag(0.0, "GIB", gib, "--smg-host-gb")
    page_size: int = _flag(SmgConfig.page_size, "TOKENS", page_size, "a power of two")
    eviction: EvictionName = DEFAULT_EVICTION
    write_policy: WritePolicy = _flag(
        WritePolicy.WRITE_THROUGH, "NAME", write_policy, ", ".join(WritePolicy)
    )
    chunk_tokens: int = _flag(8192, "N", count, "--chunked-prefill-size")
    max_running: int = _flag(256, "N", count, "--max-running-requests")
    tflops: float = _flag(
        *(400.0, "T", above_0, "prefill speed in 10^12 FLOP/s"),
        "400, an H100; 0.14 for smollm2-135m, measured on 2 CPU cores",
    )
    link_gbps: float = _flag(
        *(50.0, "G", above_0, "device to host memory, 10^9 bytes/s each way"),
        "50, or 12; `python -m smg_sglang doctor` measures yours",
    )
    storage_gb: float = _flag(0.0, "GIB", gib, "storage below host memory; 0: none")
    storage_gbps: float = _flag(
        1.0, "G", above_0, "of storage, 10^9 bytes/s; `make bench-storage` measures yours"
    )
    storage_wait_ms: float = _flag(500.0, "MS", from_0, "--smg-storage-wait-ms")
    itl_ms: float = _flag(20.0, "MS", from_0, "between two tokens of an answer", "20, or 60")
    closed: bool = False
    time_scale: float = _flag(
        1.0, "X", above_0, "multiply arrival times; above 1 is a slower trace"
    )

    @classmethod
    def flags(cls) -> dict[str, dict[str, Any]]:
        """By field what argparse wants to know of its flag."""
        return {field.name: dict(field.metadata) for field in fields(cls) if field.metadata}

    @property
    def device_pages(self) -> int:
        return self.device_tokens // self.page_size

    @property
    def page_bytes(self) -> int:
        return self.page_size * self.model.kv_bytes

    @property
    def host_bytes(self) -> int:
        return int(self.host_gb * GIB)

    @property
    def storage_pages(self) -> int:
        """Pages that storage has room for; 0: there is none."""
        return int(self.storage_gb * GIB) // self.page_bytes

    def fetch_s(self, pages: int) -> float:
        """Seconds to bring pages from storage to host memory."""
        return pages * self.page_bytes / (self.storage_gbps * 1e9)

    def needed_pages(self, request: Request) -> int:
        """Device pages of all its tokens, its answer's last one included: SGLang's scheduler runs
        a step ahead of the model."""
        return -(-(request.input_tokens + max(request.output_tokens, 1)) // self.page_size)

    def fits(self, request: Request) -> bool:
        """Whether the device's pool can ever hold it."""
        return self.needed_pages(request) < self.device_pages

    def compute_s(self, start: int, end: int) -> float:
        """Seconds to compute tokens start..end of a prompt."""
        return self.model.prefill_flops(start, end) / (self.tflops * 1e12)

    def link_s(self, pages: int) -> float:
        """Seconds to copy pages one way."""
        return pages * self.page_bytes / (self.link_gbps * 1e9)
