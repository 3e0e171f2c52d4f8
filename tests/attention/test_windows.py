import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smg_sglang.attention import windows

from .reference import random_qkv


def naive(q, k, v, scale, window):
    """Each query by itself, in float64."""
    n, m, group = len(q), len(k), q.shape[1] // k.shape[1]
    q, k, v = (x.double() for x in (q, k, v))
    outs = []
    for i in range(n):
        last = m - n + i
        seen = slice(max(0, last - window), last + 1)
        keys = k[seen].repeat_interleave(group, 1)
        values = v[seen].repeat_interleave(group, 1)
        scores = torch.einsum("hd,mhd->hm", q[i], keys) * scale
        outs.append(torch.einsum("hm,mhd->hd", scores.softmax(-1), values))
    return torch.stack(outs)


@settings(max_examples=40, deadline=None)
@given(
    new=st.integers(1, 40),
    before=st.integers(0, 50),
    window=st.integers(0, 60),
    block=st.sampled_from([1, 7, 256]),
    seed=st.integers(0, 99),
)
def test_a_query_sees_itself_and_so_many_keys_before_it(new, before, window, block, seed):
    torch.manual_seed(seed)
    q, k, v = random_qkv(new, new + before, (4, 2), (16, 16), torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "BLOCK", block)
        state = windows.attend(q, k, v, scale=0.3, window=window)
    want = naive(q, k, v, 0.3, window)
    torch.testing.assert_close(state.out.double(), want, atol=1e-5, rtol=1e-5)
