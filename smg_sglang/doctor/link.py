"""What was measured between a device and host memory. Without torch, which may be missing."""

from __future__ import annotations

import msgspec


class Link(msgspec.Struct, frozen=True):
    """What was measured, in 10^9 bytes/s; medians.

    Attributes:
        device: "cuda:0", or "cpu", where both ends are host memory.
        to_device_gbps, to_host_gbps: one copy at a time, from and to page-locked memory on CUDA,
            one thread on a CPU.
        prepare_gbps: page-locking memory for CUDA; on a CPU the first use of it.
    """

    device: str
    to_device_gbps: float
    to_host_gbps: float
    prepare_gbps: float
