"""What tests of the cache and of its tier share."""

import shutil
import tempfile
from types import SimpleNamespace

import pytest


@pytest.fixture
def no_disaggregation(monkeypatch):
    from sglang.srt.mem_cache import unified_radix_cache

    nothing = SimpleNamespace(disaggregation_mode="null")
    monkeypatch.setattr(unified_radix_cache, "get_disagg", lambda: nothing)


@pytest.fixture
def make_world(request):
    """Makes the module's `World`, in a directory that is short enough for sockets; all are closed
    at the end."""
    worlds, directories = [], []

    def make(*args, **kwargs):
        directories.append(tempfile.mkdtemp(prefix="smg-t-"))
        worlds.append(request.module.World(directories[-1], *args, **kwargs))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)
