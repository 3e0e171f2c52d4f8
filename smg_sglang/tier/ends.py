"""What a worker says of its layers that need only the end of a prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from smg_sglang.transfer.layout import DevicePool


@dataclass(frozen=True, eq=False)
class EndLayers:
    """Layers that go on from the end of a prefix, and have a pool of their own.

    Those with a sliding window read its newest tokens only; states (Mamba, linear attention, short
    convolutions) hold all of it in one slot.

    Attributes:
        layers: the model's numbers of them, in the pool's order.
        pages: of the end of a prefix that they need.
        kind: `window` or `state`.
    """

    pool: DevicePool
    layers: Sequence[int]
    pages: int
    kind: str = "window"
