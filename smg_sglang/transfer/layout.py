"""How one page of KV lies in the arena, and the device pool as byte rows.

A page in the arena is ``[layer][part][page_size][row]``: all bytes of a page together
(page-first), so that a page is one range of bytes for the memory server and the tiers below
it, and each layer of it is one range for a layer-wise load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from smg_sglang.errors import ConfigError

MAX_PAGE_SIZE = 1024
DTYPES = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
    torch.float8_e4m3fn: "float8_e4m3fn",
    torch.float8_e5m2: "float8_e5m2",
    torch.uint8: "uint8",
}


@dataclass(frozen=True)
class Part:
    """One tensor of a layer: K, V, or the latent of MLA. A row is one token's bytes of it."""

    name: str
    heads: int
    dim: int
    itemsize: int

    @property
    def row_bytes(self) -> int:
        return self.heads * self.dim * self.itemsize


@dataclass(frozen=True)
class PageLayout:
    """The bytes of one page of one rank: ``[num_layers][parts][page_size][row_bytes]``.

    Attributes:
        parts: the parts of a layer, the same in every layer, in the order they lie in a page.
        dtype: name of the element type as the pool stores it, e.g. ``bfloat16``.
    """

    parts: tuple[Part, ...]
    num_layers: int
    page_size: int
    dtype: str

    @cached_property
    def layer_bytes(self) -> int:
        return self.page_size * sum(part.row_bytes for part in self.parts)

    @property
    def page_bytes(self) -> int:
        return self.num_layers * self.layer_bytes

    def part_offset(self, layer: int, part: int) -> int:
        """Byte offset of a part of a layer from the start of the page."""
        before = sum(p.row_bytes for p in self.parts[:part])
        return layer * self.layer_bytes + before * self.page_size

    def describe(self) -> str:
        """One line that differs whenever bytes would be read differently (Namespace.layout)."""
        parts = ",".join(f"{p.name}={p.heads}x{p.dim}" for p in self.parts)
        return f"page_first:layers={self.num_layers}:{parts}:{self.dtype}:page={self.page_size}"


class DevicePool:
    """The KV tensors of one rank, seen as rows of bytes.

    Attributes:
        layout: of the pages that are copied from and to it.
        rows: ``rows[layer][part]``, uint8 ``[num_slots, row_bytes]``, views of the pool's memory.
        num_slots: valid slots are ``0 <= slot < num_slots``.

    Raises:
        ConfigError: when the tensors are not one contiguous ``[slots, heads, dim]`` per layer and
            part, all of one shape: HND, page-major and vectorised pools, or layers that differ.
    """

    def __init__(
        self,
        parts: Mapping[str, Sequence[torch.Tensor]],
        page_size: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        """``parts``: name -> one tensor per layer. ``dtype``: what the elements mean, where the
        pool stores them as bytes (SGLang keeps fp8 as uint8)."""
        if not 1 <= page_size <= MAX_PAGE_SIZE:
            raise ConfigError(f"page size {page_size} is not in 1..{MAX_PAGE_SIZE}")
        tensors = [tensor for layers in parts.values() for tensor in layers]
        lengths = {len(layers) for layers in parts.values()}
        if not tensors or len(lengths) != 1:
            raise ConfigError(f"a pool needs as many tensors of each part; got {lengths or 0}")
        for name, layers in parts.items():
            for layer, tensor in enumerate(layers):
                _check(tensor, layers[0], f"{name}[{layer}]")
        first = tensors[0]
        if any(t.shape[0] != first.shape[0] or t.device != first.device for t in tensors):
            raise ConfigError("the parts of a pool differ in slots or in device")
        if any(t.dtype != first.dtype for t in tensors):
            raise ConfigError("the parts of a pool differ in dtype")
        self.num_slots = int(first.shape[0])
        self.device = first.device
        self.layout = PageLayout(
            parts=tuple(
                Part(name, int(ls[0].shape[1]), int(ls[0].shape[2]), ls[0].element_size())
                for name, ls in parts.items()
            ),
            num_layers=lengths.pop(),
            page_size=page_size,
            dtype=DTYPES.get(dtype or first.dtype, str(dtype)),
        )
        columns = [[_byte_rows(t) for t in layers] for layers in parts.values()]
        self.rows: list[list[torch.Tensor]] = [list(layer) for layer in zip(*columns, strict=True)]

    @classmethod
    def mha(
        cls,
        k_buffer: Sequence[torch.Tensor],
        v_buffer: Sequence[torch.Tensor],
        page_size: int,
        dtype: torch.dtype | None = None,
    ) -> DevicePool:
        """From ``MHATokenToKVPool.k_buffer`` and ``.v_buffer``: per layer [slots, heads, dim]."""
        return cls({"k": k_buffer, "v": v_buffer}, page_size, dtype)

    @classmethod
    def mla(
        cls,
        kv_buffer: Sequence[torch.Tensor],
        page_size: int,
        dtype: torch.dtype | None = None,
    ) -> DevicePool:
        """From ``MLATokenToKVPool.kv_buffer``: per layer [slots, 1, kv_lora_rank + rope_dim]."""
        return cls({"kv": kv_buffer}, page_size, dtype)

    @classmethod
    def states(cls, tensors: Mapping[str, torch.Tensor]) -> DevicePool:
        """From ``MambaPool.mamba_cache``: per part one tensor [layers, slots, ...] of any dtype.

        A slot is the state of a whole prefix and not a token of it, and a page is one slot. The
        layout's dtype is uint8; what the bytes mean is in the names of the parts.

        Raises:
            ConfigError: a tensor whose slots are not contiguous, or no tensor that has any bytes.
        """
        parts = {}
        for name, tensor in tensors.items():
            if not tensor.numel():
                continue  # LFM2's states have no temporal part
            if not tensor.is_contiguous():
                raise ConfigError(f"states {name} are strided {tensor.stride()}")
            layers, slots = tensor.shape[:2]
            rows = tensor.view(layers, slots, -1).view(torch.uint8)
            parts[f"{name}:{tensor.dtype}".replace("torch.", "")] = list(rows.unsqueeze(2))
        return cls(parts, 1)


def _check(tensor: torch.Tensor, like: torch.Tensor, name: str) -> None:
    if tensor.dim() != 3:
        raise ConfigError(
            f"{name} has shape {tuple(tensor.shape)}; this memory tier copies pools of shape "
            "[slots, heads, dim] only (unset SGLANG_USE_HND_KVCACHE and page-major layouts)"
        )
    if not tensor.is_contiguous():
        raise ConfigError(f"{name} is strided {tensor.stride()}; its rows must be contiguous")
    if tensor.dtype not in DTYPES:
        raise ConfigError(f"{name} holds {tensor.dtype}; supported: {', '.join(DTYPES.values())}")
    if tensor.shape != like.shape:
        raise ConfigError(
            f"{name} has shape {tuple(tensor.shape)}, layer 0 has {tuple(like.shape)}: "
            "layers of different shapes need a pool each"
        )


def _byte_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(tensor.shape[0], -1).view(torch.uint8)
