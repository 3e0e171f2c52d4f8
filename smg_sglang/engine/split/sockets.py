"""The directories for sockets between a phase controller and its workers: made, swept, removed.

Each is marked as in use by a lock that ends with the process that made it, however that ends.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from smg_sglang.errors import ConfigError

_PREFIX = "smg-phase-"
#: What the kernel takes for a unix socket's path, and the longest name in the directory.
_MAX_PATH, _LONGEST_NAME = 107, "/99.9999.outputs"

#: (directory, fd of its mark) of this process's servers; an offline engine may start several.
_in_use: list[tuple[Path, int]] = []


def make_directory() -> Path:
    """A new private directory; those of dead servers are removed on the way.

    Raises:
        ConfigError: TMPDIR cannot be used.
    """
    _sweep()
    try:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX))  # mode 0700
        mark = _mark(path)
    except OSError as error:
        raise ConfigError(
            f"cannot make a directory for sockets in TMPDIR {tempfile.gettempdir()!r}: "
            f"{error.strerror}"
        ) from error
    assert mark is not None, "nobody else knows it yet"
    _in_use.append((path, mark))
    if len(str(path)) + len(_LONGEST_NAME) > _MAX_PATH:
        remove_directories()
        raise ConfigError(
            f"TMPDIR {tempfile.gettempdir()!r} is too long for unix sockets in it; set TMPDIR to "
            "a shorter directory, such as /tmp."
        )
    return path


def remove_directories() -> None:
    """Those of this process; idempotent."""
    while _in_use:
        path, mark = _in_use.pop()
        shutil.rmtree(path, ignore_errors=True)
        os.close(mark)


def _mark(path: Path) -> int | None:
    """An fd whose lock marks the directory as in use; None where another process has it."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def _sweep() -> None:
    """Remove this user's directories whose server is dead. What cannot be removed stays."""
    for path in Path(tempfile.gettempdir()).glob(_PREFIX + "*"):
        try:
            mine = path.stat().st_uid == os.getuid()
            mark = _mark(path) if mine else None
        except OSError:
            continue
        if mark is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(mark)
