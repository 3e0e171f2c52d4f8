"""Loads into several pools whose layers together are a model's: full attention, windows, states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import torch

from smg_sglang.transfer.mover import Mark, Mover, PageMove


class JointMover(Mover):
    """Pool 0 is the one that `prepare` and `spill` are about; the others have movers of their own.

    Layers are those of the model: each belongs to one pool, or to two (attention beside a state in
    one layer) or to none (an MLP alone), and a forward waits for it whichever that is. On CUDA the
    movers share a stream (`CudaMover`, ``beside``), so that a layer's mark covers all before it.
    """

    def __init__(self, movers: Sequence[Mover], layers: Sequence[Sequence[int]]) -> None:
        """layers: for each pool the model's numbers of its layers, in its own order."""
        super().__init__(movers[0].pool)
        self._movers = list(movers)
        self._place = [{layer: at for at, layer in enumerate(mine)} for mine in layers]  # by pool
        if any(len(place) != len(mine) for place, mine in zip(self._place, layers, strict=True)):
            raise ValueError("a pool has a layer of the model twice")

    @property
    def num_layers(self) -> int:
        return 1 + max(layer for place in self._place for layer in place)

    def bytes_of(self, moves: Sequence[PageMove]) -> int:
        return sum(self._movers[move.pool].bytes_of([move]) for move in moves)

    def prepare(self, slots: torch.Tensor, arena: np.ndarray, offsets: np.ndarray) -> PageMove:
        return self._movers[0].prepare(slots, arena, offsets)

    def prepare_in(
        self, pool: int, slots: torch.Tensor, arena: np.ndarray, offsets: np.ndarray
    ) -> PageMove:
        return replace(self._movers[pool].prepare(slots, arena, offsets), pool=pool)

    def spill(self, move: PageMove, after: Sequence[Mark] = ()) -> None:
        self._movers[move.pool].spill(move, after)

    def load_layers(self, layers: range, move: PageMove) -> None:
        for layer in layers:
            at = self._place[move.pool].get(layer)
            if at is not None:
                self._movers[move.pool].load_layers(range(at, at + 1), move)

    def load_groups(self, moves: Sequence[PageMove]) -> list[range]:
        return [range(layer, layer + 1) for layer in range(self.num_layers)]

    def fence(self) -> list[Mark]:
        return self._movers[0].fence()

    @contextmanager
    def loading(
        self, moves: Sequence[PageMove], after: Sequence[Mark]
    ) -> Iterator[Sequence[PageMove]]:
        begun: list[PageMove] = []
        with ExitStack() as stack:
            for pool, mover in enumerate(self._movers):
                mine = [move for move in moves if move.pool == pool]
                begun += stack.enter_context(mover.loading(mine, after))
            yield begun

    def mark(self) -> Mark:
        return self._movers[0].mark()

    def enqueues(self, moves: Sequence[PageMove]) -> bool:
        return all(self._movers[move.pool].enqueues([move]) for move in moves)

    def pin(self, arena: np.ndarray) -> None:
        self._movers[0].pin(arena)

    def unpin(self, arena: np.ndarray) -> None:
        self._movers[0].unpin(arena)

    def close(self) -> None:
        for mover in self._movers:
            mover.close()
