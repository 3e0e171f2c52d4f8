"""A subscriber that replays the KV events knows what the device and host memory hold."""

import json
import threading

import msgspec
import pytest
import zmq

from smg_sglang.memory.client import MemoryConnection
from smg_sglang.memory.namespace import Namespace
from smg_sglang.tier.host_picture import _names
from tests.e2e.conftest import PROMPTS, eventually, memory_process, smg_state, token_ids
from tests.e2e.test_host_tier import storm
from tools.sglang_server import free_port

PORT = free_port()
CONFIG = {"publisher": "zmq", "endpoint": f"tcp://127.0.0.1:{PORT}", "bind": True}
#: A host memory that the prompts fill.
SERVER_ARGS = ("--kv-events-config", json.dumps(CONFIG), "--smg-host-gb", "0.0625")
HOST, DEVICE = "CPU_PINNED", "GPU"


class Subscriber:
    """Replays the stream as a router does."""

    def __init__(self):
        self.blocks = {HOST: {}, DEVICE: {}}  # name -> (parent, tokens)
        self.unknown = 0
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.connect(CONFIG["endpoint"])
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self):
        self._stop.set()
        self._thread.join()
        self._socket.close(0)

    def held(self, medium):
        return set(self.blocks[medium])

    def _run(self):
        while not self._stop.is_set():
            if self._socket.poll(50):
                _, _, payload = self._socket.recv_multipart()
                for event in msgspec.msgpack.decode(payload)[1]:
                    self._hear(event)

    def _hear(self, event):
        match event["type"]:
            case "BlockStored":
                parent, size = event.get("parent_block_hash"), event["block_size"]
                for at, name in enumerate(event["block_hashes"]):
                    tokens = event["token_ids"][at * size : (at + 1) * size]
                    self.blocks[event["medium"]][name] = (parent, tokens)
                    parent = name
            case "BlockRemoved":
                for name in event["block_hashes"]:
                    self.unknown += self.blocks[event["medium"]].pop(name, None) is None
            case "AllBlocksCleared":
                for blocks in self.blocks.values():
                    blocks.clear()


@pytest.fixture(scope="module")
def subscriber(server):
    listener = Subscriber()
    yield listener
    listener.close()


def in_memory(server):
    """The names of all pages that the memory server has."""
    state = smg_state(server)
    namespace = msgspec.convert(state["namespace"], Namespace)
    connection = MemoryConnection.open(state["memory_address"], namespace, 5.0)
    try:
        return {name for _, keys in connection.changes(-1, 5.0).entries for name in _names(keys)}
    finally:
        connection.close()


def same(subscriber, server):
    """Whether what was heard is what is there, and something is."""
    there = in_memory(server)
    return there and subscriber.held(HOST) == there


def text_of(subscriber, medium, name):
    """All tokens up to the end of a block."""
    tokens = []
    while name is not None:
        parent, mine = subscriber.blocks[medium][name]
        tokens, name = mine + tokens, parent
    return tokens


def test_after_a_storm_what_was_heard_is_what_is_there(server, subscriber):
    server.flush()
    for prompt in PROMPTS:
        server.generate(prompt, 4)
    storm(server)
    eventually(lambda: same(subscriber, server), "the picture differs", 30)
    prompt = PROMPTS[0]
    whole = len(prompt) // 16 * 16
    texts = [text_of(subscriber, HOST, name) for name in subscriber.held(HOST)]
    assert prompt[:whole] in texts
    assert subscriber.unknown == 0


def test_pages_that_host_memory_evicts_are_removed(server, subscriber):
    before = subscriber.held(HOST)
    for seed in range(7000, 7040):
        server.generate(token_ids(seed, 1500), 1)
        if not before <= subscriber.held(HOST):
            break
    eventually(lambda: not before <= subscriber.held(HOST), "nothing was removed", 30)
    eventually(lambda: same(subscriber, server), "the picture differs", 30)
    assert subscriber.unknown == 0


def test_a_flush_and_a_new_memory_server_leave_nothing(server, subscriber):
    server.flush()
    eventually(lambda: not subscriber.held(HOST) and not subscriber.held(DEVICE), "not cleared")
    server.generate(PROMPTS[0], 4)
    eventually(lambda: same(subscriber, server), "the picture differs", 30)
    memory_process(server).kill()
    eventually(lambda: not subscriber.held(HOST), "the dead server's pages were not removed", 30)
    eventually(lambda: smg_state(server)["memory_connected"], "no new memory server", 30)
    server.generate(PROMPTS[1], 4)
    eventually(lambda: same(subscriber, server), "the picture differs", 30)
