"""Contexts of a million tokens: page tables, attention, and the memory server's books are right."""

import numpy as np
import pytest
import torch

from smg_sglang.attention.page_attention import make_page_attention
from smg_sglang.attention.pages import page_memory, page_rows, page_run, plan_pages
from smg_sglang.attention.torch_pages import TorchAttention
from smg_sglang.memory.books import Books
from smg_sglang.memory.namespace import Namespace
from smg_sglang.transfer.layout import PageLayout, Part
from smg_sglang.tree.page_keys import KEY_BYTES

TOKENS, PAGE = 1_000_000, 16
LAYOUT = PageLayout((Part("k", 1, 8, 4), Part("v", 1, 8, 4)), 1, PAGE, "float32")


def expected(q, k, v, scale):
    """By definition, in float64."""
    scores = (k[:, 0].astype(np.float64) @ q[0].astype(np.float64).T) * scale
    most = scores.max(0)
    weights = np.exp(scores - most)
    out = (weights.T @ v[:, 0].astype(np.float64)) / weights.sum(0)[:, None]
    return out, most + np.log(weights.sum(0))


@pytest.mark.parametrize("make", [lambda: make_page_attention(2), TorchAttention])
def test_attention_over_a_million_tokens_at_random_places(make):
    pages, rng = TOKENS // PAGE, np.random.default_rng(0)
    arena = rng.standard_normal(pages * LAYOUT.page_bytes // 4, dtype=np.float32).view(np.uint8)
    order = rng.permutation(pages).astype(np.int64)
    table = plan_pages([[page_run(0, order * LAYOUT.page_bytes, PAGE)]], page_rows(LAYOUT))
    q = torch.randn(1, 4, 8)
    out, lse = torch.empty(1, 4, 8), torch.empty(1, 4)
    make().attend_pages(q, table, [page_memory(arena, LAYOUT, 0)], out, lse, scale=0.5)
    rows = arena.view(np.float32).reshape(pages, 2, PAGE, 1, 8)[order]
    k, v = (rows[:, part].reshape(TOKENS, 1, 8) for part in (0, 1))
    want, want_lse = expected(q.numpy(), k, v, 0.5)
    np.testing.assert_allclose(out[0].numpy(), want, atol=2e-5)
    np.testing.assert_allclose(lse[0].numpy(), want_lse, rtol=1e-6)


def test_the_books_hold_a_path_of_a_million_tokens():
    namespace = Namespace("m", "float32", LAYOUT.describe(), PAGE, LAYOUT.page_bytes)
    pages = TOKENS // PAGE
    books = Books(2 * pages * LAYOUT.page_bytes)
    books.connect(b"a", namespace)
    path = np.arange(pages * KEY_BYTES // 8, dtype="<u8").tobytes()
    for end in range(4096, pages + 4096, 4096):  # as it is computed, chunk by chunk
        have, new = books.reserve(b"a", end, path[: end * KEY_BYTES])
        assert have == end - 4096 and len(new) == min(end, pages) - have
        books.publish(b"a", end)
    found = books.lookup(b"a", 1, path, 0)
    assert len(found) == len(np.unique(found)) == pages
    assert (
        len(books.lookup(b"a", 2, path[:-KEY_BYTES] + bytes(KEY_BYTES), 50_000)) == pages - 50_001
    )
    books.release(b"a", 1)
    books.release(b"a", 2)
    books.check_invariants()
