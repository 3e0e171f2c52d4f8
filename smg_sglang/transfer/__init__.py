"""Page layouts, device<->host copies, layer-wise loads and the spill queue.

Nothing here decides what to move; it moves what it is told, byte for byte.

`docs/ordering.md` says who may touch which bytes when.
"""

from smg_sglang.transfer.layer_counter import LayerCounter
from smg_sglang.transfer.layer_loads import LayerLoads
from smg_sglang.transfer.layout import DevicePool, PageLayout, Part
from smg_sglang.transfer.mover import Mover, PageMove, random_delay
from smg_sglang.transfer.movers import make_mover
from smg_sglang.transfer.spills import SpillDropped, SpillQueue, SpillTarget

__all__ = [
    "DevicePool",
    "LayerCounter",
    "LayerLoads",
    "Mover",
    "PageLayout",
    "PageMove",
    "Part",
    "SpillDropped",
    "SpillQueue",
    "SpillTarget",
    "make_mover",
    "random_delay",
]
