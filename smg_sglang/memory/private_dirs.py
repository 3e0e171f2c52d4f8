"""Temporary directories for sockets: made here, and swept when their owner died.

Each is marked as in use by a lock that ends with the process that made it, however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from smg_sglang.errors import ConfigError
from smg_sglang.memory.address import SUN_PATH_MAX

_RANDOM_CHARS = 8  # of mkdtemp


@dataclass(frozen=True)
class PrivateDirs:
    """One kind of them, told by its prefix.

    Attributes:
        whose: what is said to a user about.
        longest: the longest name of a socket in it.
        locks: files in it that others lock as long as they use it.
    """

    prefix: str
    whose: str
    longest: str
    locks: tuple[str, ...] = ()

    def make(self) -> tuple[Path, int]:
        """A new directory, mode 0700, and the fd that marks it as in use, until closed.

        Raises:
            ConfigError: TMPDIR cannot be used.
        """
        base = tempfile.gettempdir()
        path = os.path.join(base, self.prefix + "x" * _RANDOM_CHARS, self.longest)
        if len(os.fsencode(path)) > SUN_PATH_MAX:
            raise ConfigError(
                f"TMPDIR {base!r} is too long for a unix socket in it: set TMPDIR to a shorter "
                "directory, such as /tmp"
            )
        try:
            made = Path(tempfile.mkdtemp(prefix=self.prefix))
            mark = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(mark, fcntl.LOCK_EX)
        except OSError as error:
            raise ConfigError(
                f"cannot make a directory for {self.whose} in TMPDIR {base!r}: {error.strerror}"
            ) from error
        return made, mark

    def sweep(self) -> int:
        """Remove this user's directories that nobody alive uses; returns how many.

        Never raises: what cannot be removed stays.
        """
        found = Path(tempfile.gettempdir()).glob(self.prefix + "*")
        return sum(self._remove_if_dead(path) for path in found)

    def _remove_if_dead(self, path: Path) -> bool:
        with contextlib.ExitStack() as held:
            try:
                found = path.lstat()
                if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                    return False
                # The owner's mark, then the others'. One without theirs may just be made.
                for name in (path, *(path / lock for lock in self.locks)):
                    kind = os.O_RDONLY | os.O_DIRECTORY if name == path else os.O_RDWR
                    fd = os.open(name, kind | os.O_NOFOLLOW | os.O_CLOEXEC)
                    held.callback(os.close, fd)
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
            shutil.rmtree(path, ignore_errors=True)
        return True


#: Of embedded memory servers, which lock theirs while they run (`Address.claim`).
MEMORY_DIRS = PrivateDirs("smg-memory-", "the memory server", "control", ("lock",))
