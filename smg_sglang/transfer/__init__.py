"""Page layouts, device<->host copies, layer-wise loads and the spill queue.

Nothing here decides what to move; it moves what it is told, byte for byte. `docs/ordering.md` says
who may touch which bytes when.
"""
