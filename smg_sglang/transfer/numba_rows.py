"""The copy kernels compiled by numba. Importing this module compiles them (or reads the cache).

They write with non-temporal stores, as libc's memcpy does for large blocks: a plain store first
reads the line it is about to overwrite, and pages are too small (6 KiB for K of SmolLM2) for
memcpy to choose otherwise. Measured 1.1 to 1.6 times as fast as memcpy per block; the data is
not read again soon enough to miss it in the cache. What random 6 KiB blocks still lack to a plain
copy are TLB misses (`/sys/kernel/mm/transparent_hugepage/shmem_enabled` = advise cures them).
"""
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN001, ANN201, PLR0917 (numba types these functions)

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped] # it has no stubs
from numba import njit, types
from numba.extending import intrinsic

LINE = 64

# libc's own, by symbol: unlike a ctypes address this can be cached on disk.
_memcpy = types.ExternalFunction("memcpy", types.intp(types.intp, types.intp, types.intp))


@intrinsic
def _stream_line(typing_context, dst, src):
    """Copy 64 bytes past the cache; ``dst`` is aligned to 64, ``src`` is not."""

    def codegen(context, builder, signature, args):
        line = ir.VectorType(ir.IntType(64), LINE // 8)
        loaded = builder.load(builder.inttoptr(args[1], line.as_pointer()), align=1)
        store = builder.store(loaded, builder.inttoptr(args[0], line.as_pointer()), align=LINE)
        hint = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        store.set_metadata("nontemporal", hint)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _fence(typing_context):
    """Order streamed stores before whatever tells another thread or process that they are done."""

    def codegen(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@njit(nogil=True)
def _stream(dst, src, size):
    head = min(-dst % LINE, size)
    _memcpy(dst, src, head)
    lines_end = dst + head + (size - head) // LINE * LINE
    end = dst + size
    dst, src = dst + head, src + head
    while dst < lines_end:
        _stream_line(dst, src)
        dst, src = dst + LINE, src + LINE
    _memcpy(dst, src, end - dst)


@njit(nogil=True)
def _run_length(slots, at, end):
    """How many slots from ``at`` on follow each other, before ``end``."""
    run = 1
    while at + run < end and slots[at + run] == slots[at] + run:
        run += 1
    return run


_SIGNATURE = types.void(
    types.int64[::1],
    types.int64[::1],
    types.int64[::1],
    types.int64,
    types.int64[::1],
    types.int64[::1],
    types.int64,
)


def _compile(function: Any) -> Any:
    try:
        return njit(_SIGNATURE, nogil=True, cache=True)(function)
    except RuntimeError:  # numba finds no directory that it may cache in
        return njit(_SIGNATURE, nogil=True)(function)


@_compile
def spill_rows(bases, row_bytes, page_offsets, arena, slots, offsets, page_size):
    """Device rows to pages of the arena. Addresses are not checked: `Mover.prepare` did that.

    Layer by layer (segment outermost): a page is long, and few streams of stores are faster.

    Args:
        bases, row_bytes, page_offsets: int64 [segments], for each layer and part the address of
            its rows, the bytes of a row, and where it lies in a page.
        arena: address of the arena.
        slots: int64 [n * page_size].
        offsets: int64 [n], byte offset of each page in the arena.
    """
    for segment in range(bases.shape[0]):
        row = row_bytes[segment]
        for page in range(offsets.shape[0]):
            host = arena + offsets[page] + page_offsets[segment]
            at, end = page * page_size, (page + 1) * page_size
            while at < end:
                run = _run_length(slots, at, end)
                _stream(host, bases[segment] + slots[at] * row, run * row)
                host += run * row
                at += run
    _fence()


@_compile
def load_rows(bases, row_bytes, page_offsets, arena, slots, offsets, page_size):
    """Pages of the arena to device rows; otherwise as `spill_rows`.

    Page by page, since the parts of one layer of a page lie side by side and are read as one.
    """
    for page in range(offsets.shape[0]):
        for segment in range(bases.shape[0]):
            row = row_bytes[segment]
            host = arena + offsets[page] + page_offsets[segment]
            at, end = page * page_size, (page + 1) * page_size
            while at < end:
                run = _run_length(slots, at, end)
                _stream(bases[segment] + slots[at] * row, host, run * row)
                host += run * row
                at += run
    _fence()
