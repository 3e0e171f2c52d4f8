"""The client's two sockets beside a server that is there in part."""

import socket
import time
from types import SimpleNamespace

import pytest
import zmq

from smg_sglang.errors import MemoryUnavailable
from smg_sglang.memory import protocol
from smg_sglang.memory.channel import Channel


@pytest.fixture
def half(directory):
    """A channel to a server whose control socket may go while its life line still stands."""
    endpoint = f"ipc://{directory}/control"
    server = zmq.Context.instance().socket(zmq.ROUTER)
    server.bind(endpoint)
    here, there = socket.socketpair()
    channel = Channel(endpoint, b"me", here)
    yield SimpleNamespace(channel=channel, server=server)
    channel.close()
    there.close()
    server.close(linger=0)


def ask(channel):
    return channel.ask(protocol.Ping(channel.next_id()), 0.2)


def test_a_question_does_not_wait_for_a_peer_that_is_gone(half):
    """The scheduler asks: it would hang for good. A dying server's sockets do not go all at once."""
    half.channel.tell(protocol.Touch(b""))
    assert half.server.poll(5000)
    half.server.close(linger=0)
    deadline = time.monotonic() + 5
    while half.channel._socket.poll(0, zmq.POLLOUT):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    with pytest.raises(MemoryUnavailable):
        ask(half.channel)
    assert not half.channel.alive
