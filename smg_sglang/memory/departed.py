"""Connections that ended while their process lives: what they held stays theirs for now.

A worker whose socket was dropped, or that was stopped, may have copies under way, to pages that it
reserved and from pages that it leased. Were those given to another at once, the copies would write
over, or read, what is not theirs. So they stay with the connection until the process says that its
copies have ended (`protocol.LetGo`), or has died: a pidfd cannot be fooled by a number used again.
"""

import contextlib
import os
import select
import socket
from collections.abc import Callable, Iterable

from smg_sglang.memory.address import peer

#: Linux 6.5; Python has no name for it yet.
SO_PEERPIDFD = 77


def peer_process(connection: socket.socket) -> tuple[int, int]:
    """(pid, pidfd) of the process at the other end of a unix socket; the fd is the caller's.

    Raises OSError where it cannot be watched: it has died, or it is in a container of its own and
    the kernel is older than Linux 6.5.
    """
    pid = peer(connection).pid
    with contextlib.suppress(OSError):
        return pid, connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    return pid, os.pidfd_open(pid)


def has_died(pidfd: int) -> bool:
    """Whether the process has ended; asks the kernel."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


class Departed:
    """Who they are, by the pidfd that says that their process has died. The server's thread only.

    `lost` is called with the identity of each whose pages may be given to others now.
    """

    def __init__(self, lost: Callable[[bytes], None]) -> None:
        self._lost = lost
        self._by_pidfd: dict[int, tuple[bytes, int]] = {}

    def add(self, identity: bytes, pid: int, pidfd: int) -> None:
        """`pidfd` is ours from now on."""
        self._by_pidfd[pidfd] = (identity, pid)

    def __contains__(self, pidfd: object) -> bool:
        return pidfd in self._by_pidfd

    def identities(self, pid: int | None = None) -> list[bytes]:
        """Of all, or of one process."""
        return [name for name, of in self._by_pidfd.values() if pid is None or of == pid]

    def end(self, pidfd: int) -> None:
        """Its process has died."""
        identity, _ = self._by_pidfd.pop(pidfd)
        os.close(pidfd)
        self._lost(identity)

    def named(self, identities: Iterable[bytes]) -> list[int]:
        """The pidfds of these, to be ended: their process says that their copies have. Those that
        are not known, of another instance of the server, are ignored."""
        wanted = set(identities)
        return [fd for fd, (identity, _) in self._by_pidfd.items() if identity in wanted]

    def close(self) -> None:
        for pidfd in self._by_pidfd:
            os.close(pidfd)
        self._by_pidfd.clear()
