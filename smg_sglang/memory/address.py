"""Where a memory server lives: a private directory with two sockets and a lock."""

import contextlib
import fcntl
import os
import socket
import stat
import struct
from dataclasses import dataclass
from typing import NamedTuple

from smg_sglang.errors import ConfigError

SUN_PATH_MAX = 107  # bytes of a unix socket's path, sockaddr_un


@dataclass(frozen=True)
class Address:
    """`directory` holds `control` (ZMQ), `life` (unix SEQPACKET) and `lock`; and perhaps `storage`
    (ZMQ)."""

    directory: str

    @classmethod
    def parse(cls, text: str) -> "Address":
        """From `ipc://DIR` or `DIR`. Raises ConfigError for anything else."""
        path = text.removeprefix("ipc://")
        if not path or "://" in path:
            raise ConfigError(f"memory address {text!r}: give a directory, as ipc://DIR or DIR")
        address = cls(os.path.abspath(os.path.expanduser(path)))
        if len(os.fsencode(f"{address.directory}/control")) > SUN_PATH_MAX:
            raise ConfigError(f"memory address {text!r} is too long for a unix socket (100 bytes)")
        return address

    @classmethod
    def default(cls) -> "Address":
        """Of a server of its own: $XDG_RUNTIME_DIR (or /tmp), then smg-UID/memory."""
        base = os.environ.get("XDG_RUNTIME_DIR") or "/tmp"
        return cls.parse(os.path.join(base, f"smg-{os.getuid()}", "memory"))

    @property
    def control(self) -> str:
        """ZMQ endpoint."""
        return f"ipc://{self.directory}/control"

    @property
    def life(self) -> str:
        """Path of the unix socket."""
        return f"{self.directory}/life"

    @property
    def storage(self) -> str:
        """Path of the storage process's socket, where the memory server has one."""
        return f"{self.directory}/storage"

    def __str__(self) -> str:
        return f"ipc://{self.directory}"

    def claim(self) -> int:
        """Make the directory ours and lock it; returns the lock's fd, held while we live.

        Sockets of a dead server are taken over. Raises ConfigError when another server lives
        here or when somebody else could get at the directory; OSError when the disk is full.
        """
        parent = os.path.dirname(self.directory)
        if os.path.basename(parent) == f"smg-{os.getuid()}":
            _make_private(parent)  # the default's parent, which may lie in a shared /tmp
        _make_private(self.directory)
        lock = os.open(f"{self.directory}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(lock)
            raise ConfigError(
                f"a memory server (pid {holder}) already runs at {self}: stop it, or choose "
                "another --address"
            ) from None
        try:
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
            self.remove_sockets()
        except OSError:  # the disk is full
            os.close(lock)
            raise
        return lock

    def remove_sockets(self) -> None:
        """Unlink what `claim`'s owner bound; only for who holds the lock."""
        for path in (self.life, f"{self.directory}/control", self.storage):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


class Peer(NamedTuple):
    """The process at the other end of a unix socket, as the kernel knows it."""

    pid: int
    uid: int


def peer(connection: socket.socket) -> Peer:
    """Who is at the other end."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", raw)
    return Peer(pid, uid)


def _make_private(directory: str) -> None:
    """Create with mode 0700, or check that nobody else can enter."""
    try:
        os.makedirs(os.path.dirname(directory), exist_ok=True)
        os.mkdir(directory, 0o700)
    except FileExistsError:
        pass  # or a file stands in its parent's place, which lstat tells
    except OSError as error:
        raise ConfigError(f"cannot create {directory}: {error.strerror}") from error
    try:
        found = os.lstat(directory)
    except OSError as error:
        raise ConfigError(f"cannot use {directory}: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"{directory} is not a directory: choose another --address")
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(
            f"{directory} is open to other users (mode {stat.S_IMODE(found.st_mode):o}, owner "
            f"{found.st_uid}): make it yours with mode 700, or choose another --address"
        )
