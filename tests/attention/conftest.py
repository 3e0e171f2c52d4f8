"""Fixtures of the attention tests."""

from __future__ import annotations

import pytest

from smg_sglang.attention.page_attention import find_native


@pytest.fixture(scope="module", params=["numba", "native"])
def kernel(request):
    """What answers single queries: None is numba."""
    if request.param == "numba":
        yield None
        return
    native = find_native(threads=2)
    assert native is not None, "there is a compiler where the tests run"
    yield native
    native.close()
