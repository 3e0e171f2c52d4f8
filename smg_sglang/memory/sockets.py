"""The two sockets a memory server opens in its directory."""

import os
import socket

import zmq

from smg_sglang.memory import protocol
from smg_sglang.memory.address import Address


def listen(address: Address) -> socket.socket:
    """The life socket; never blocks."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.setblocking(False)
    listener.bind(address.life)
    os.chmod(address.life, 0o600)
    listener.listen(128)
    return listener


def bind(context: zmq.Context[zmq.Socket[bytes]], address: Address) -> zmq.Socket[bytes]:
    """The control socket."""
    control = context.socket(zmq.ROUTER)
    control.setsockopt(zmq.LINGER, 0)
    control.setsockopt(zmq.MAXMSGSIZE, protocol.MAX_MESSAGE_BYTES)
    control.bind(address.control)
    os.chmod(address.control.removeprefix("ipc://"), 0o600)
    return control
