"""Page layouts, device<->host copies, layer-wise loads and the spill queue.

Nothing here decides what to move; it moves what it is told, byte for byte.

Who may touch which bytes when
------------------------------
Two kinds of memory: *slots* of the device pool and *pages* of the arena. The engine keeps a
slot from being reused, and a lease or a reservation keeps a page, for as long as a copy may
touch them. What is left to order is copies against the forward:

==========================  =====================================  ==============================
edge                        CPU                                    CUDA
==========================  =====================================  ==============================
forward writes slots, then  the forward is synchronous on the      the job carries events recorded
a spill reads them          scheduler thread, so what it wrote is  on the forward stream when it
                            there before `SpillQueue.submit`;      was submitted; the spill thread
                            the queue's lock publishes it to the   waits for them before it
                            spill thread                           enqueues the first copy
spill reads slots, then     the job's slots stay locked until the  the same: a completion is only
anybody reuses them         scheduler pops its completion          queued after the copy's event
                                                                   has been reached
spill writes a page, then   `publish` is called by the same        the same, after the event
a reader loads it           thread after the copy returned; the
                            kernel ends with a store fence
forward still uses a slot   cannot happen: no forward runs while   the load stream waits for the
that was freed and given    the scheduler thread starts a batch    scheduler's current stream and
to a load                                                          for `order_after` (the forward
                                                                   stream, which may still write
                                                                   the extra token of a finished
                                                                   request under overlap)
load writes a layer, then   `LayerCounter.wait_until(layer)`       the current stream waits for
the forward reads it        blocks on the batch's condition until  the layer's event; the CPU waits
                            the loader thread passed that layer    only while a layer is not yet
                                                                   enqueued (unpinned pages,
                                                                   or copies by copy engines).
                                                                   Layers of one launch share an
                                                                   event, which is behind them all
load writes slots, then     the engine frees or inserts them only  the same: `finish` waits for
anybody reuses them         after `LayerLoads.finish(index)`       the last layer's event
load reads a page, then     the lease is released after `finish`   the same
the server reuses it        (or after `cancel` said True)
two batches of loads        one loader thread, in start order      one load stream, in start order
a segment lands, then       the reader waits for its copy          the reader's stream waits for the
attention reads it                                                 event behind the fill
attention reads a segment,  it has returned before its buffer is   the fill waits for an event that
then its buffer is filled   given back                             was recorded on the reader's
                                                                   stream when it was given back
==========================  =====================================  ==============================

Spills and loads are not ordered against each other: a page that is being written is leased to
nobody, and a slot that is being loaded belongs to a request that has not computed it yet.
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
