"""The temporary directories of embedded servers: made here, and swept when their owner died."""

import contextlib
import fcntl
import glob
import os
import shutil
import stat
import tempfile

from smg_sglang.errors import ConfigError
from smg_sglang.memory.address import Address

_PREFIX = "smg-memory-"
_RANDOM_CHARS = 8  # of mkdtemp


def make_private_dir() -> tuple[str, int]:
    """A new directory and the fd that marks it as in use, until closed. Raises ConfigError."""
    base = tempfile.gettempdir()
    try:
        Address.parse(os.path.join(base, _PREFIX + "x" * _RANDOM_CHARS))
    except ConfigError:
        raise ConfigError(
            f"TMPDIR {base!r} is too long for a unix socket in it: set TMPDIR to a shorter "
            "directory, such as /tmp"
        ) from None
    try:
        path = tempfile.mkdtemp(prefix=_PREFIX)
        mark = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(mark, fcntl.LOCK_EX)
    except OSError as error:
        raise ConfigError(
            f"cannot make a directory for the memory server in TMPDIR {base!r}: {error.strerror}"
        ) from error
    return path, mark


def sweep_private_dirs() -> int:
    """Remove this user's directories whose owner and server are both dead; returns how many.

    Never raises: what cannot be removed stays.
    """
    pattern = os.path.join(glob.escape(tempfile.gettempdir()), _PREFIX + "*")
    return sum(_remove_if_dead(path) for path in glob.glob(pattern))


def _remove_if_dead(path: str) -> bool:
    with contextlib.ExitStack() as held:
        try:
            found = os.lstat(path)
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                return False
            # The owner's mark, then the server's lock. A directory without a lock may just be made.
            for name, flags in ((path, os.O_RDONLY | os.O_DIRECTORY), (f"{path}/lock", os.O_RDWR)):
                fd = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
                held.callback(os.close, fd)
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        shutil.rmtree(path, ignore_errors=True)
    return True
