"""Triton kernels where there is no GPU."""

import importlib
import sys
from contextlib import contextmanager

import pytest


@contextmanager
def interpreted(monkeypatch, name):
    """The module `name` with its kernels in Triton's interpreter; it is forgotten afterwards."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    module = importlib.import_module(name)
    importlib.reload(module)
    yield module
    del sys.modules[name]
