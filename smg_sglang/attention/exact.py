"""Partial attention over paged keys as plain products: what FlashInfer has no kernels for.

That is float32, values of another width than the keys, and latents (MLA) of odd sizes. The slow,
exact way: the keys of each request are gathered, then all scores go through memory.

On a CPU it does the same, and is compared with float64 there, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from smg_sglang.attention import plain
from smg_sglang.attention.batch import KV, Rule
from smg_sglang.attention.paged import Heads, PagedKeys
from smg_sglang.attention.partial import PartialState


class ExactKernels:
    """For one device; keeps nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def begin(self) -> None:
        """Nothing is kept from pass to pass."""

    def planned(
        self, keys: PagedKeys, new: Sequence[int], rule: Rule, heads: Heads, *, causal: bool
    ) -> Gathered:
        """As `paged.Kernels.planned`."""
        return Gathered(_slots_each(keys), list(new), rule, causal)


@dataclass(frozen=True)
class Gathered:
    """slots: int32, each request's on the device, in the order of its tokens. new: its queries."""

    slots: Sequence[torch.Tensor]
    new: list[int]
    rule: Rule
    causal: bool

    def __call__(self, q: torch.Tensor, kv: KV) -> PartialState:
        """As `paged.Planned`."""
        states = [
            self._attend(queries, kv, slots)
            for queries, slots in zip(q.split(self.new), self.slots, strict=True)
        ]
        return PartialState(torch.cat([s.out for s in states]), torch.cat([s.lse for s in states]))

    def _attend(self, q: torch.Tensor, kv: KV, slots: torch.Tensor) -> PartialState:
        k = kv.k.index_select(0, slots)
        v = k[..., : kv.v.shape[2]] if kv.latent else kv.v.index_select(0, slots)
        rule = self.rule
        return plain.attend(q, k, v, scale=rule.scale, causal=self.causal, logit_cap=rule.logit_cap)


def _slots_each(keys: PagedKeys) -> list[torch.Tensor]:
    """int32 [tokens] for each request."""
    inside = torch.arange(keys.page_size, dtype=torch.int32, device=keys.pages.device)
    slots = (keys.pages.unsqueeze(1) * keys.page_size + inside).flatten()
    rooms = [pages * keys.page_size for pages in keys.pages_each]
    return [mine[:length] for mine, length in zip(slots.split(rooms), keys.lengths, strict=True)]
