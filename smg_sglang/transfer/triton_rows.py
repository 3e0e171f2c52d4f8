"""The copy kernel for CUDA: it reads and writes page-locked host memory directly.

One launch per layer and part, few programs: PCIe is full long before the SMs are, and the
forward wants the SMs. Runs in Triton's interpreter in the tests; has not run on a GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN001, PLR0917 (Triton types the kernel)

TILE_WORDS = 2048
"""Words that one program has in flight: 16 KiB of int64."""
WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


# A kernel is compiled when a server starts, and never again for other numbers or alignments.
@triton.jit(
    do_not_specialize=["address", "num_tokens"],
    do_not_specialize_on_alignment=["slots", "page_words"],
)
def _move_tiles(
    rows,
    address,
    slots,
    page_words,
    num_tokens,
    row_words,
    page_size: tl.constexpr,
    tokens_per_tile: tl.constexpr,
    words_per_tile: tl.constexpr,
    to_arena: tl.constexpr,
):
    arena_words = tl.cast(address, rows.dtype)
    num_tiles = (num_tokens + tokens_per_tile - 1) // tokens_per_tile
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        tokens = tile * tokens_per_tile + tl.arange(0, tokens_per_tile)
        valid = tokens < num_tokens
        slot = tl.load(slots + tokens, mask=valid, other=0)
        page = tl.load(page_words + tokens // page_size, mask=valid, other=0)
        device = rows + slot * row_words
        host = arena_words + page + (tokens % page_size) * row_words
        for start in range(0, row_words, words_per_tile):
            words = start + tl.arange(0, words_per_tile)
            mask = valid[:, None] & (words < row_words)[None, :]
            if to_arena:
                value = tl.load(device[:, None] + words[None, :], mask=mask)
                tl.store(host[:, None] + words[None, :], value, mask=mask)
            else:
                value = tl.load(host[:, None] + words[None, :], mask=mask)
                tl.store(device[:, None] + words[None, :], value, mask=mask)


def move_rows(
    rows: torch.Tensor,
    address: int,
    slots: torch.Tensor,
    page_words: torch.Tensor,
    *,
    page_size: int,
    word: int,
    programs: int,
    to_arena: bool,
) -> None:
    """Copy one part of one layer of some pages, on the current stream.

    Args:
        rows: uint8 [num_slots, row_bytes] on the device.
        address: in page-locked host memory, from where ``page_words`` count.
        slots: int64 [n * page_size] on the device.
        page_words: int64 [n] on the device: where the part of each page is, in words.
        word: bytes copied at once: 8, 4, 2 or 1; divides every address involved.
        programs: how many to launch.
    """
    dtype = WORDS[word]
    row_words = rows.shape[1] // word
    words_per_tile = min(triton.next_power_of_2(row_words), TILE_WORDS)
    _move_tiles[(programs,)](
        rows.view(dtype),
        address,
        slots,
        page_words,
        slots.numel(),
        row_words,
        page_size=page_size,
        tokens_per_tile=TILE_WORDS // words_per_tile,
        words_per_tile=words_per_tile,
        to_arena=to_arena,
    )
