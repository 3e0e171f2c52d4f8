"""What a worker says of its layers with sliding windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from smg_sglang.transfer.layout import DevicePool


@dataclass(frozen=True, eq=False)
class WindowLayers:
    """Layers that read the newest tokens only, and have a pool of their own.

    Attributes:
        layers: the model's numbers of them, in the pool's order.
        pages: of the end of a prefix that they need.
    """

    pool: DevicePool
    layers: Sequence[int]
    pages: int
