"""Numbers on a command line, as argparse types: what cannot be meant ends in a sentence."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError

from smg_sglang.config import MAX_PAGE_SIZE, WritePolicy

_MOST = (1 << 31) - 1
_MOST_GB = 1 << 20


def count(text: str) -> int:
    """A whole number from 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= _MOST:
        raise ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return value


def counts(text: str) -> list[int]:
    """Some of them, with commas between."""
    return [count(part) for part in text.split(",")]


def above_0(text: str) -> float:
    """A number above 0, and finite."""
    value = _finite(text)
    if value is None or value <= 0:
        raise ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return value


def from_0(text: str) -> float:
    """A number from 0, and finite."""
    value = _finite(text)
    if value is None or value < 0:
        raise ArgumentTypeError(f"must be a number of at least 0, not {text!r}")
    return value


def gib(text: str) -> float:
    """A size of host memory in GiB, 0 for none."""
    value = from_0(text)
    if value > _MOST_GB:
        raise ArgumentTypeError(f"must be at most {_MOST_GB} GiB, not {text!r}")
    return value


def gibs(text: str) -> list[float]:
    """Some of them, with commas between, each once."""
    return list(dict.fromkeys(gib(part) for part in text.split(",")))


def page_size(text: str) -> int:
    """What a server takes: a power of two."""
    value = count(text)
    if value > MAX_PAGE_SIZE or value & (value - 1):
        raise ArgumentTypeError(f"must be a power of two from 1 to {MAX_PAGE_SIZE}, not {text!r}")
    return value


def write_policy(text: str) -> WritePolicy:
    """One of the server's."""
    if text not in list(WritePolicy):
        raise ArgumentTypeError(f"must be one of {', '.join(WritePolicy)}, not {text!r}")
    return WritePolicy(text)


def _finite(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
