"""The copy kernel compiled by numba. Importing this module compiles it (or reads numba's cache)."""

from __future__ import annotations

from typing import Any

from numba import njit, types

_SIGNATURE = types.void(
    types.int64[::1],
    types.int64[::1],
    types.int64[::1],
    types.int64,
    types.int64[::1],
    types.int64[::1],
    types.int64,
)

# libc's own, by symbol: unlike a ctypes address this can be cached on disk.
_memcpy = types.ExternalFunction("memcpy", types.intp(types.intp, types.intp, types.intp))


def _compile(function: Any) -> Any:
    try:
        return njit(_SIGNATURE, nogil=True, cache=True)(function)
    except RuntimeError:  # numba finds no directory it may cache in
        return njit(_SIGNATURE, nogil=True)(function)


@_compile
def spill_rows(bases, row_bytes, page_offsets, arena, slots, offsets, page_size):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201, PLR0917 (numba types it)
    """Device rows to the arena. Addresses are not checked: `Mover.prepare` did that."""
    for page in range(offsets.shape[0]):
        for segment in range(bases.shape[0]):
            row = row_bytes[segment]
            host = arena + offsets[page] + page_offsets[segment]
            token = 0
            while token < page_size:
                slot = slots[page * page_size + token]
                run = 1
                while (
                    token + run < page_size and slots[page * page_size + token + run] == slot + run
                ):
                    run += 1
                _memcpy(host + token * row, bases[segment] + slot * row, run * row)
                token += run


@_compile
def load_rows(bases, row_bytes, page_offsets, arena, slots, offsets, page_size):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201, PLR0917 (numba types it)
    """The arena's pages to device rows; otherwise as `spill_rows`."""
    for page in range(offsets.shape[0]):
        for segment in range(bases.shape[0]):
            row = row_bytes[segment]
            host = arena + offsets[page] + page_offsets[segment]
            token = 0
            while token < page_size:
                slot = slots[page * page_size + token]
                run = 1
                while (
                    token + run < page_size and slots[page * page_size + token + run] == slot + run
                ):
                    run += 1
                _memcpy(bases[segment] + slot * row, host + token * row, run * row)
                token += run
