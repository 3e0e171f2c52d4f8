"""What a simulated server is made of."""

from __future__ import annotations

from dataclasses import dataclass

from smg_sglang.config import DEFAULT_EVICTION, EvictionName, SmgConfig, WritePolicy
from smg_sglang.simulate.model import ModelCost
from smg_sglang.trace.request import Request

GIB = 1 << 30


@dataclass(frozen=True)
class Settings:
    """A server and its machine.

    Attributes:
        device_tokens: slots of the device's KV pool (`--max-total-tokens`).
        host_gb: host memory for pages, in GiB; 0 for none.
        chunk_tokens: new tokens a prefill step (`--chunked-prefill-size`).
        max_running: requests at a time (`--max-running-requests`).
        tflops: what the device does in prefill, in 10^12 FLOP/s.
        link_gbps: between device and host memory, each way, in 10^9 bytes/s.
        itl_ms: between two tokens of an answer.
        closed: one request after another, whatever their timestamps.
        time_scale: arrival times are multiplied by it; above 1 is a slower trace.
    """

    model: ModelCost
    device_tokens: int
    host_gb: float = 0.0
    page_size: int = SmgConfig.page_size
    eviction: EvictionName = DEFAULT_EVICTION
    write_policy: WritePolicy = SmgConfig.write_policy
    chunk_tokens: int = 8192
    max_running: int = 256
    tflops: float = 400.0
    link_gbps: float = 50.0
    itl_ms: float = 20.0
    closed: bool = False
    time_scale: float = 1.0

    @property
    def device_pages(self) -> int:
        return self.device_tokens // self.page_size

    @property
    def page_bytes(self) -> int:
        return self.page_size * self.model.kv_bytes

    @property
    def host_bytes(self) -> int:
        return int(self.host_gb * GIB)

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
