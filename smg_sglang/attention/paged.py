"""Partial attention over paged keys on a device: the one interface, and what it speaks of.

`flashinfer` has kernels for it, and `exact` what they cannot do; `kernels` chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from smg_sglang.attention.batch import KV, Rule
from smg_sglang.attention.partial import PartialState


class PagedKeys(NamedTuple):
    """The keys of R requests in a pool.

    lengths: tokens of each, at least one. pages: int32 on the device, those of one request after
    another, in the order of their tokens and no more than these need. page_size: tokens a page.
    """

    lengths: Sequence[int]
    pages: torch.Tensor
    page_size: int

    @property
    def pages_each(self) -> list[int]:
        """Pages of each request; the last of them may be filled in part."""
        return [-(-length // self.page_size) for length in self.lengths]


class Heads(NamedTuple):
    """The shape of a layer's attention. dim: of queries and keys; dtype: of all."""

    query: int
    kv: int
    dim: int
    v_dim: int
    dtype: torch.dtype


class Planned(Protocol):
    """Kernels that were planned for the keys of a batch; valid until the forward after the next."""

    def __call__(self, q: torch.Tensor, kv: KV) -> PartialState:
        """Attend q [N, q_heads, dim], contiguous, to the planned slots of a pool.

        The output has the queries' dtype; the log-sum-exp is natural. Enqueued on the current
        stream.
        """


class Kernels(Protocol):
    """Plans and runs partial attention on one device. One thread, one forward at a time."""

    @property
    def device(self) -> torch.device: ...

    def begin(self) -> None:
        """A new forward pass: plans of the one before the last are forgotten."""

    def planned(
        self, keys: PagedKeys, new: Sequence[int], rule: Rule, heads: Heads, *, causal: bool
    ) -> Planned:
        """Plan for requests with these keys and so many queries each.

        causal: the queries are the last of the keys.
        """


def heads_of(q: torch.Tensor, kv: KV) -> Heads:
    """The shape of these queries [N, heads, dim] and this pool."""
    return Heads(q.shape[1], kv.k.shape[1], kv.k.shape[2], kv.v.shape[2], q.dtype)


def one_slot_pages(slots: torch.Tensor, lengths: Sequence[int]) -> PagedKeys:
    """Page tables whose pages are single slots, as SGLang gives them to FlashInfer.

    slots: int32 [sum of lengths] on the device, of one request after another.
    """
    return PagedKeys(lengths, slots, 1)


def whole_pages(pages: int, page_size: int, device: torch.device) -> PagedKeys:
    """The page table of one request in the first pages of a buffer, in their order."""
    table = torch.arange(pages, dtype=torch.int32, device=device)
    return PagedKeys([pages * page_size], table, page_size)


def staged(numbers: np.ndarray, device: torch.device) -> torch.Tensor:
    """A tensor on the CPU from where a copy to the device makes nobody wait: out of pageable
    memory it would wait for all that is on the stream."""
    tensor = torch.from_numpy(numbers)
    return tensor.pin_memory() if device.type == "cuda" else tensor
