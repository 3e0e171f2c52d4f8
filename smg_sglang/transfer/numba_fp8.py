"""`fp8_rows` for a CPU, compiled by numba. Importing this module compiles it (or reads the cache).

All in integers, on the bits of float32; a bfloat16 is the upper half of one. Equal to the torch
operations to the bit, but for what is no number.
"""
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN001, ANN201 (numba types these functions)

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types

_SIGN = np.uint32(0x80000000)
_REST = np.uint32(0x7FFFFFFF)
_INFINITE = np.uint32(0x7F800000)
_MANTISSA = np.uint32(0x007FFFFF)
_HIDDEN = np.uint32(0x00800000)
#: The bits of float32 for each e4m3 number but the sign, its scale being 1.
_WIDE = np.array(
    [0.0] + [n * 2.0**-9 for n in range(1, 8)]
    + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)],
    np.float32,
).view(np.uint32)  # fmt: skip
_WIDE[127] = 0x7FC00000


def _compile(*signatures: Any) -> Any:
    def decorate(function: Any) -> Any:
        try:
            return njit(list(signatures), nogil=True, cache=True)(function)
        except RuntimeError:  # numba finds no directory that it may cache in
            return njit(list(signatures), nogil=True)(function)

    return decorate


@njit(nogil=True, inline="always")
def _narrowed(bits, exponent):
    """The e4m3 of a float32 divided by 2**exponent: to the nearest, ties to even."""
    rest = np.int32(bits & _REST)
    field = (rest >> 23) - exponent - 120
    normal = ((rest + 0x7FFFF + ((rest >> 20) & 1)) >> 20) - ((120 + exponent) << 3)
    shift = min(21 - min(field, 0), 25)
    full = (rest & 0x7FFFFF) | 0x800000
    small = (full + (1 << (shift - 1)) - 1 + ((full >> shift) & 1)) >> shift
    return (normal if field > 0 else small) | np.int32((bits & _SIGN) >> np.uint32(24))


@_compile(*(
    types.void(element[:, :, ::1], types.int64[::1], types.uint8[:, :, ::1], types.uint8[:, :, ::1])
    for element in (types.uint16, types.uint32)
))  # fmt: skip
def narrow(rows, slots, values, scales):
    """As `fp8_rows.narrow_rows`; rows as their bits, uint16 of a bfloat16 or uint32 of a float32.

    Slots are not checked: `Mover.prepare` did that.
    """
    up = np.uint32(32 - 8 * rows.itemsize)
    dim = rows.shape[2]
    for token in range(slots.shape[0]):
        for head in range(rows.shape[1]):
            row = rows[slots[token], head]
            largest = np.uint32(0)
            for d in range(dim):
                largest = max(largest, (np.uint32(row[d]) << up) & _REST)
            if largest >= _INFINITE:
                scales[token, head, 0] = 255
                values[token, head] = 0x7F
                continue
            exponent = np.int32(largest >> np.uint32(23)) - np.int32(135)
            exponent += np.int32((largest & _MANTISSA) > 0x600000)
            exponent = max(exponent, np.int32(-100))
            scales[token, head, 0] = exponent + 127
            to = values[token, head]
            for d in range(dim):
                to[d] = _narrowed(np.uint32(row[d]) << up, exponent)


@_compile(*(
    types.void(types.uint8[:, :, ::1], types.uint8[:, :, ::1], element[:, :, ::1], types.int64[::1])
    for element in (types.uint16, types.uint32)
))  # fmt: skip
def widen(values, scales, rows, slots):
    """As `fp8_rows.widen_rows`, into bits as `narrow` takes them."""
    down = np.uint32(32 - 8 * rows.itemsize)
    for token in range(slots.shape[0]):
        for head in range(rows.shape[1]):
            scale = np.int32(scales[token, head, 0]) - 127
            row = rows[slots[token], head]
            if scale == 128:
                row[:] = np.uint32(0x7FC00000) >> down
                continue
            add = np.uint32(scale << 23)
            for d in range(rows.shape[2]):
                code = np.uint32(values[token, head, d])
                bits = _WIDE[code & np.uint32(127)]
                if bits != 0:
                    bits += add
                row[d] = (bits | ((code & np.uint32(128)) << np.uint32(24))) >> down
