"""Which mover a device has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from smg_sglang.errors import ConfigError
from smg_sglang.transfer.cpu import CpuMover
from smg_sglang.transfer.layout import DevicePool
from smg_sglang.transfer.mover import Mover
from smg_sglang.transfer.narrow import NarrowMover
from smg_sglang.transfer.pinning import ArenaPins


def make_mover(
    pool: DevicePool,
    *,
    order_after: Sequence[Any] = (),
    pins: ArenaPins | None = None,
    beside: Mover | None = None,
    narrow: bool = False,
) -> Mover:
    """The mover for the pool's device.

    Args:
        order_after: CUDA streams (the forward stream) that loads must come after, besides the
            current one. Ignored on a CPU, where the forward is synchronous.
        pins: of all movers that copy the same arenas; its own by default. A CPU pins nothing.
        beside: the mover of another pool that is loaded together with this one (`joint`).
        narrow: pages hold fp8 (`NarrowMover`).

    Raises:
        ConfigError: there is no mover for this device.
    """
    if narrow:
        pins = pins or ArenaPins()  # one for both of its staging pools
        return NarrowMover(
            pool,
            lambda rows: make_mover(rows, order_after=order_after, pins=pins, beside=beside),
        )
    if pool.device.type == "cpu":
        return CpuMover(pool)
    if pool.device.type == "cuda":
        from smg_sglang.transfer.cuda import CudaMover

        if isinstance(beside, NarrowMover):
            beside = beside.loads
        assert beside is None or isinstance(beside, CudaMover)
        return CudaMover(pool, order_after=order_after, shared_pins=pins, beside=beside)
    raise ConfigError(f"no page copies for device {pool.device.type}; supported: cpu, cuda")
