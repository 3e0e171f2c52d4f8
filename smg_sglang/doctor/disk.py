"""How fast a directory is read and written, beside the operating system's cache."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from smg_sglang.box import GIB
from smg_sglang.doctor.finding import Finding, advice, wrong

_BLOCK, _FILE = 1 << 20, 256 << 20
#: Below this a prefix of most models is computed sooner than it is read (docs/storage.md).
_SLOW_GBPS = 0.2


def look_at_disk(directory: str) -> Iterator[Finding]:
    """What `--smg-storage file` would find there. Writes 256 MiB, and deletes them."""
    what = f"storage, {directory}"
    try:
        free = shutil.disk_usage(directory).free
        speeds = direct_speed(Path(directory), min(_FILE, free // 4 // _BLOCK * _BLOCK))
    except OSError as error:
        yield wrong(what, f"cannot be used: {error.strerror}", "choose a directory of your own")
        return
    if not speeds:
        found = f"{free / GIB:.0f} GiB free; no direct I/O here, so its speed is not known"
        yield advice(what, found, "a directory on a local disk is best")
        return
    read, write = speeds["read"] / 1e9, speeds["write"] / 1e9
    found = f"{read:.2f} GB/s read, {write:.2f} GB/s written, {free / GIB:.0f} GiB free"
    if read < _SLOW_GBPS:
        yield advice(what, found, "prefixes are hardly read faster than computed; try another disk")
    else:
        yield Finding(what, found)


def direct_speed(directory: Path, nbytes: int = _FILE) -> dict[str, float]:
    """Bytes a second of direct writes and reads, 1 MiB each, one at a time; empty where the file
    system has no direct I/O, or no room. Raises OSError where no file can be made."""
    with tempfile.TemporaryDirectory(prefix="smg-speed-", dir=directory) as folder:
        path = os.path.join(folder, "plain")
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        except OSError:
            return {}
        try:
            return _move_both_ways(fd, nbytes)
        except OSError:
            return {}
        finally:
            os.close(fd)


def _move_both_ways(fd: int, nbytes: int) -> dict[str, float]:
    block = mmap.mmap(-1, _BLOCK)
    block.write(os.urandom(_BLOCK))
    speeds = {}
    for name, move in (("write", os.pwritev), ("read", os.preadv)):
        began = time.perf_counter()
        for at in range(0, max(nbytes, _BLOCK), _BLOCK):
            move(fd, [block], at)
        os.fsync(fd)
        speeds[name] = max(nbytes, _BLOCK) / (time.perf_counter() - began)
    return speeds
