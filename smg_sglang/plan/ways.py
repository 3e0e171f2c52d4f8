"""How long a token takes, by where its context lies and who attends it. Arithmetic only.

A step of decode reads the active weights once for the whole batch, and the context of each request.
With W the seconds to read the weights on the device, K the bytes of context in host memory, of all
requests of the batch:

- **device**: all of it lies in the device's memory: W + K / device rate.
- **streamed**: K crosses the link for each token. What is copied is known beforehand, so that
  copies go on while the device computes: max(W, K / link).
- **host attention**: the CPU attends K where it lies. A layer's attention needs its queries, and
  the next layer needs its output, so that nothing overlaps: W + K / r + hops, with r what the CPU
  reads while it attends, and hops a trip down and up for each layer.
- **both**: a share x of the pages is attended by the CPU, the rest is streamed, at the same time:
  max(W + xK / r + hops, (1 - x)K / link), least where both are equal (or x is 0). Both read host
  memory, so no less than K / DRAM rate.

r is what memory gives or what the cores compute, whichever is less: 4 FLOPs a number of K and V and
query head that shares it. With grouped queries memory decides, with MLA, where all heads read one
latent, the cores do. (Roofline: Williams et al., 2009. FastDecode and NEO measure the third way.)
"""

from __future__ import annotations

from dataclasses import dataclass

from smg_sglang.box import GIB
from smg_sglang.plan.shape import DecodeShape

GB = 1e9
#: Of the device's memory, what weights and KV may have: SGLang's own default is about that.
USABLE = 0.88


@dataclass(frozen=True)
class Box:
    """What a machine has.

    Attributes:
        device_gbps, link_gbps, dram_gbps: GB/s of the device's memory, of the link to it (one way)
            and of host memory.
        attention_gbps: GB/s of keys and values that the CPU attends, all cores together.
        cpu_tflops: what these cores compute in float32.
        device_gib, host_gib: memory of the device, and for pages.
        hop_us: microseconds for queries down to the CPU and states up again, of one layer.
        dollars_an_hour, watts: of all of it.
    """

    device_gbps: float
    link_gbps: float
    dram_gbps: float
    attention_gbps: float
    cpu_tflops: float
    device_gib: float
    host_gib: float
    hop_us: float
    dollars_an_hour: float
    watts: float


@dataclass(frozen=True)
class Way:
    """One way to keep and attend the contexts of a batch.

    Attributes:
        step_s: seconds of one step, which gives one token to each request; None: it does not fit.
        cpu_share: of the pages in host memory, that the CPU attends.
        fits: how many such contexts there is room for.
    """

    name: str
    step_s: float | None
    fits: int
    cpu_share: float = 0.0


def host_attention_gbps(shape: DecodeShape, box: Box) -> float:
    """What the CPU attends a second: memory's rate, or its arithmetic where that is less."""
    flops_a_byte = shape.attention_flops / shape.kv_bytes
    return min(box.attention_gbps, box.cpu_tflops * 1e12 / flops_a_byte / GB)


def best_share(shape: DecodeShape, box: Box, kv_bytes: float) -> float:
    """Of pages in host memory, the share that the CPU should attend while the rest is streamed."""
    if kv_bytes <= 0:
        return 0.0
    streamed = kv_bytes / (box.link_gbps * GB)
    attended = kv_bytes / (host_attention_gbps(shape, box) * GB)
    alone = weights_s(shape, box) + hops_s(shape, box)
    return min(1.0, max(0.0, (streamed - alone) / (streamed + attended)))


def weights_s(shape: DecodeShape, box: Box) -> float:
    """Seconds to read the active weights on the device."""
    return shape.active_bytes / (box.device_gbps * GB)


def hops_s(shape: DecodeShape, box: Box) -> float:
    """Seconds of all trips between device and CPU of one step."""
    return shape.layers * box.hop_us / 1e6


def ways(shape: DecodeShape, box: Box, context: int, batch: int) -> list[Way]:
    """The four, for `batch` requests of `context` tokens each."""
    kv = float(batch) * context * shape.kv_bytes
    on_device = _room(shape, box, context)
    on_host = int(box.host_gib * GIB // (context * shape.kv_bytes))
    weights, hops = weights_s(shape, box), hops_s(shape, box)
    rate = host_attention_gbps(shape, box) * GB
    share = best_share(shape, box, kv)
    streamed = max(weights, kv / (box.link_gbps * GB))
    attended = weights + hops + kv / rate
    together = max(
        weights + (hops if share else 0.0) + share * kv / rate,
        (1 - share) * kv / (box.link_gbps * GB),
        kv / (box.dram_gbps * GB),
    )
    fits = shape.weight_bytes <= USABLE * box.device_gib * GIB

    def way(name: str, step_s: float, room: int, cpu_share: float = 0.0) -> Way:
        return Way(name, step_s if fits and batch <= room else None, room, cpu_share)

    return [
        way("device", weights + kv / (box.device_gbps * GB), on_device),
        way("streamed", streamed, on_host),
        way("host attention", attended, on_host, 1.0),
        # Not worse than either: it may choose a share of 0 or 1.
        way("both", min(together, streamed, attended), on_host, share),
    ]


def cpu_worker(shape: DecodeShape, box: Box, context: int, batch: int) -> Way:
    """A decode worker without a GPU: weights and contexts in host memory, read by the CPU."""
    room = int((box.host_gib * GIB - shape.weight_bytes) // (context * shape.kv_bytes))
    kv = float(batch) * context * shape.kv_bytes
    rate = host_attention_gbps(shape, box) * GB
    step = shape.active_bytes / (box.dram_gbps * GB) + kv / rate
    return Way("CPU worker", step if batch <= room else None, max(0, room), 1.0)


def _room(shape: DecodeShape, box: Box, context: int) -> int:
    left = USABLE * box.device_gib * GIB - shape.weight_bytes
    return max(0, int(left // (context * shape.kv_bytes)))


def dollars_a_million(step_s: float, batch: int, dollars_an_hour: float) -> float:
    """Of tokens generated."""
    return dollars_an_hour / 3600 * step_s / batch * 1e6


def kwh_a_million(step_s: float, batch: int, watts: float) -> float:
    """Of tokens generated."""
    return watts * step_s / batch * 1e6 / 3.6e6
