"""The merge of partial states on CUDA: one launch, in place, accumulated in float32.

FlashInfer's own `merge_state` holds the running output in bf16 or fp16, and so rounds it at each
merge; a long context has hundreds. Runs in Triton's interpreter in the tests, too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN001, PLR0917 (Triton types the kernel)


@triton.jit
def _merge_rows(out, lse, other, other_lse, dim: tl.constexpr, width: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, width)
    mask = lanes < dim
    first, second = tl.load(lse + row), tl.load(other_lse + row)
    top = tl.maximum(first, second)
    # Where both sides are empty, -inf - -inf would be nan; both weights are zero then.
    top = tl.where(top == float("-inf"), 0.0, top)
    a, b = tl.exp(first - top), tl.exp(second - top)
    total = a + b
    whole = tl.where(total == 0.0, 1.0, total)
    value = tl.load(out + row * dim + lanes, mask=mask, other=0.0) * (a / whole)
    added = tl.load(other + row * dim + lanes, mask=mask, other=0.0).to(tl.float32)
    # An empty state's output counts for nothing, whatever a kernel has left in it.
    value += tl.where(b == 0.0, 0.0, added * (b / whole))
    tl.store(out + row * dim + lanes, value, mask=mask)
    tl.store(lse + row, tl.where(total == 0.0, float("-inf"), tl.log(whole) + top))


def merge_in_place(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> None:
    """Merge a partial state into `out` and `lse`, on the current stream.

    Args:
        out: float32 [N, heads, dim], contiguous.
        lse: float32 [N, heads], natural log, contiguous.
        other: any float [N, heads, dim], contiguous; over other keys than `out`.
        other_lse: float32 [N, heads], natural log, contiguous.
    """
    dim = out.shape[2]
    width = triton.next_power_of_2(dim)
    rows = out.shape[0] * out.shape[1]
    if rows:
        # One warp a row: each thread then moves 16 bytes of 128 float32 at once.
        _merge_rows[(rows,)](out, lse, other, other_lse, dim=dim, width=width, num_warps=1)
