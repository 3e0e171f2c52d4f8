"""The copy kernel for CUDA: it reads and writes page-locked host memory directly.

One launch copies any number of buffers (a part of a layer each) whose rows are equally long: a
launch costs the CPU some tens of microseconds (an estimate), more than the copy itself takes where
pages are few. Few programs: PCIe is full long before the SMs are, and the forward wants the SMs.
Runs in Triton's interpreter in the tests, too.

The grid
--------
A *row* is one token's bytes of one buffer. The rows of a launch are numbered buffer after buffer,
token after token: row ``r`` is token ``r % num_tokens`` of buffer ``r // num_tokens``. A tile is
`TILE_WORDS` words: as many whole rows as fit, or a long row in several steps. Program ``i`` of
``n`` copies tiles ``i, i + n, i + 2n, ...``, across the ends of buffers. So all programs have work
where a buffer has less than a tile for each (a page of 16 tokens of an 8B model has two tiles a
buffer), and of all tiles only the last lacks rows.

Bytes in flight: 16 programs of 16 KiB are 256 KiB. A full PCIe 5 link needs 50 GB/s x 2 us = 100 KB
(an estimate, the latency is not measured), so that more programs should bring nothing.

The width
---------
A thread moves 16 bytes at a time, the widest access there is, where every address is a multiple of
16. A tile of 16 KiB is then 8 loads and 8 stores for each of 128 threads, and a warp touches 512
bytes at a time, of one row where rows are as long. A word has 8 bytes at most; Triton takes two at
once where it can prove them aligned. It can, as the length of rows is a constant and the addresses
out of tables are declared multiples of ``unit``. Rows that are no multiple of 16 bytes, which no
usual head size makes, go by 8, 4, 2 or 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN001, PLR0917 (Triton types the kernel)

TILE_WORDS = 2048
"""Words that one program has in flight: 16 KiB of int64."""
WORDS = {16: tl.int64, 8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.uint8}
"""The type of a word, by the bytes accessed at once."""


# A kernel is compiled when a server starts, and never again for other numbers or alignments.
@triton.jit(
    do_not_specialize=["num_rows", "num_tokens"],
    do_not_specialize_on_alignment=["table", "slots", "pages"],
)
def _move_tiles(
    table,
    slots,
    pages,
    num_rows,
    num_tokens,
    word: tl.constexpr,
    unit: tl.constexpr,
    row_words: tl.constexpr,
    page_size: tl.constexpr,
    rows_per_tile: tl.constexpr,
    words_per_tile: tl.constexpr,
    to_arena: tl.constexpr,
):
    num_tiles = (num_rows + rows_per_tile - 1) // rows_per_tile
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        row = tile * rows_per_tile + tl.arange(0, rows_per_tile)
        valid = row < num_rows
        buffer, token = row // num_tokens, row % num_tokens
        base = tl.load(table + 2 * buffer, mask=valid, other=0)
        place = tl.load(table + 2 * buffer + 1, mask=valid, other=0)
        slot = tl.load(slots + token, mask=valid, other=0)
        page = tl.load(pages + token // page_size, mask=valid, other=0)
        first_slot = tl.multiple_of(base.to(tl.pointer_type(word)), [unit])
        first_token = tl.multiple_of((page + place).to(tl.pointer_type(word)), [unit])
        device = first_slot + slot * row_words
        host = first_token + (token % page_size) * row_words
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
    table: torch.Tensor,
    slots: torch.Tensor,
    pages: torch.Tensor,
    *,
    row_bytes: int,
    page_size: int,
    unit: int,
    programs: int,
    to_arena: bool,
    tile_words: int = TILE_WORDS,
    warps: int = 4,
) -> None:
    """Copy some buffers of some pages in one launch, on the current stream.

    Args:
        table: int64 [buffers, 2] on the device. Of each buffer the address of slot 0, and the byte
            in a page where its rows begin.
        slots: int64 [n * page_size] on the device.
        pages: int64 [n] on the device: the address of each page, in page-locked host memory.
        row_bytes: of each buffer.
        unit: bytes accessed at once: 16, 8, 4, 2 or 1; divides every address and ``row_bytes``.
        programs: how many to launch.
        tile_words, warps: of each program; others than these are for `bench/copy_candidates.py`.
    """
    word = WORDS[unit]
    row_words = row_bytes * 8 // word.primitive_bitwidth
    words_per_tile = min(triton.next_power_of_2(row_words), tile_words)
    _move_tiles[(programs,)](
        table,
        slots,
        pages,
        len(table) * slots.numel(),
        slots.numel(),
        word=word,
        unit=unit,
        row_words=row_words,
        page_size=page_size,
        rows_per_tile=tile_words // words_per_tile,
        words_per_tile=words_per_tile,
        to_arena=to_arena,
        num_warps=warps,
    )
