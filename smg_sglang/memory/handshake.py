"""The first words between a client and the memory server."""

import os
import socket
from collections.abc import Sequence

import msgspec

from smg_sglang.errors import MemoryUnavailable
from smg_sglang.memory import protocol
from smg_sglang.memory.address import Address, peer
from smg_sglang.memory.namespace import Namespace

_WELCOME_MAX_BYTES = 64 << 10


def shake_hands(
    where: Address, namespace: Namespace, timeout_s: float, let_go: Sequence[bytes] = ()
) -> tuple[socket.socket, protocol.Welcome, int]:
    """The life line, the server's welcome and the arena's fd; socket and fd are the caller's.

    `let_go`: identities of former connections whose copies have ended. Each of the three steps
    waits `timeout_s` at most. Raises MemoryUnavailable.
    """
    try:
        life = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError as error:  # out of file descriptors
        raise MemoryUnavailable(f"cannot look for a memory server at {where}: {error}") from error
    fds: list[int] = []
    try:
        life.settimeout(timeout_s)
        life.connect(where.life)
        _check_owner(life)
        life.send(protocol.encode(protocol.Hello(protocol.VERSION, namespace, list(let_go))))
        data, fds, _, _ = socket.recv_fds(life, _WELCOME_MAX_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        return life, _read_welcome(data, fds), fds[0]
    except (OSError, msgspec.MsgspecError, MemoryUnavailable) as error:
        life.close()
        for fd in fds:
            os.close(fd)
        raise MemoryUnavailable(f"no memory server at {where}: {error}") from error


def _check_owner(life: socket.socket) -> None:
    if peer(life).uid != os.getuid():
        raise MemoryUnavailable("it belongs to another user")


def _read_welcome(data: bytes, fds: list[int]) -> protocol.Welcome:
    if not data:
        raise MemoryUnavailable("it hung up")
    welcome: protocol.Welcome | protocol.Refused = protocol.decode_welcome(data)
    if isinstance(welcome, protocol.Refused):
        raise MemoryUnavailable(f"it refused: {welcome.reason}")
    if not fds:
        raise MemoryUnavailable("it sent no arena")
    return welcome
