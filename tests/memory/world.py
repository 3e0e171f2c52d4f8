"""Small factories for the memory tests."""

import itertools
import time
from collections.abc import Callable

import psutil

from smg_sglang.memory.namespace import Namespace

_PAGE_BYTES = 1024


def make_namespace(model: str = "m", page_bytes: int = _PAGE_BYTES, **changes: object) -> Namespace:
    return Namespace(
        **{
            "model": model,
            "dtype": "bf16",
            "layout": "flat",
            "page_size": 16,
            "page_bytes": page_bytes,
        }
        | changes
    )


def make_path(*pages: int) -> bytes:
    """A path of one key per number; equal numbers at equal places give equal prefixes."""
    return b"".join(n.to_bytes(16, "little") for n in pages)


_unseen = itertools.count(1 << 20)


def fresh_path(n: int) -> bytes:
    """A path of `n` pages that nobody has seen before."""
    return make_path(*(next(_unseen) for _ in range(n)))


def is_gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def eventually(condition: Callable[[], object], within_s: float = 5.0) -> None:
    """Poll until `condition` holds; fails after `within_s`."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.002)
