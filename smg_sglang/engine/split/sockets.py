"""The directories for sockets between a phase controller and its workers."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from smg_sglang.memory.private_dirs import PrivateDirs

_DIRS = PrivateDirs("smg-phase-", "the workers' sockets", "99.9999.outputs")
#: (directory, fd of its mark) of this process's servers; an offline engine may start several.
_in_use: list[tuple[Path, int]] = []


def make_directory() -> Path:
    """A new private directory; those of dead servers are removed on the way.

    Raises:
        ConfigError: TMPDIR cannot be used.
    """
    _DIRS.sweep()
    _in_use.append(_DIRS.make())
    return _in_use[-1][0]


def remove_directories() -> None:
    """Those of this process; idempotent."""
    while _in_use:
        path, mark = _in_use.pop()
        shutil.rmtree(path, ignore_errors=True)
        os.close(mark)
