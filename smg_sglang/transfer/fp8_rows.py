"""Rows of a pool as fp8 with a scale a head, and back.

A row's head becomes e4m3 numbers and the exponent of one power of two, so chosen that the head's
largest number takes up the format's range (448), as in the MX formats of the Open Compute Project
(Microscaling Formats specification 1.0) with blocks of a head. A power of two costs no precision,
one byte, and makes what has been rounded once come back to the bit when it is rounded again.

What is no number in a head leaves no number in it. Numbers below 2**-109 become zero.
"""

from __future__ import annotations

from typing import Any

import torch

from smg_sglang.transfer.compiling import fp8_kernels

FP8 = torch.float8_e4m3fn
#: Exponents of scales: of the smallest, so that scaled numbers and their scales stay normal ones.
LEAST = -100
BIAS = 127
NO_NUMBER = 255


def narrow_rows(
    rows: torch.Tensor, slots: torch.Tensor, values: torch.Tensor, scales: torch.Tensor
) -> None:
    """Fill values and scales from the rows of some slots.

    rows: [num_slots, heads, dim], float32, bfloat16 or float16. slots: int64 [n]. values: uint8
    [n, heads, dim]. scales: uint8 [n, heads, 1]: the exponent and 127, or 255. All on one device;
    on CUDA it is enqueued on the current stream.
    """
    compiled = _compiled(rows)
    if compiled is not None:
        compiled.narrow(_bits(rows), slots.numpy(), values.numpy(), scales.numpy())
        return
    wide = rows[slots].float()
    largest = wide.abs().amax(-1, keepdim=True)
    mantissa, exponent = torch.frexp(largest)
    exponent = (exponent - 9 + (mantissa > 0.875)).clamp_(min=LEAST)
    values.copy_((wide * _power_of_two(-exponent)).to(FP8).view(torch.uint8))
    scales.copy_(torch.where(torch.isfinite(largest), exponent + BIAS, NO_NUMBER))


def widen_rows(
    values: torch.Tensor, scales: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor
) -> None:
    """Fill the rows of some slots, the inverse of `narrow_rows`."""
    compiled = _compiled(rows)
    if compiled is not None:
        compiled.widen(values.numpy(), scales.numpy(), _bits(rows), slots.numpy())
        return
    powers = _power_of_two(scales.int() - BIAS)
    rows[slots] = (values.view(FP8).float() * powers).to(rows.dtype)


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2**exponent as float32, by its bits: infinite for that of `NO_NUMBER`."""
    return ((exponent.to(torch.int32) + BIAS) << 23).view(torch.float32)


def _bits(rows: torch.Tensor) -> Any:
    return rows.view({2: torch.uint16, 4: torch.uint32}[rows.element_size()]).numpy()


def _compiled(rows: torch.Tensor) -> Any:
    """The kernels for such rows on a CPU, if there are any."""
    known = rows.dtype in {torch.float32, torch.bfloat16} and rows.device.type == "cpu"
    return fp8_kernels.ready() if known else None
