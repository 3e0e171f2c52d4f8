"""The world is made as for tests of the cache above it."""

from tests.engine.conftest import make_world

__all__ = ["make_world"]
