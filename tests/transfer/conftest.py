"""A CUDA device that is not there."""

import importlib
import sys

import pytest

from tests.fake_cuda import FakeCuda


@pytest.fixture
def cuda(monkeypatch):
    """Streams and events with an order, kernels in Triton's interpreter."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    module = importlib.import_module("smg_sglang.transfer.triton_rows")
    importlib.reload(module)
    yield FakeCuda().install(monkeypatch)
    del sys.modules["smg_sglang.transfer.triton_rows"]
