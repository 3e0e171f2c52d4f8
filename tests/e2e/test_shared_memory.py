"""A memory server of its own: shared by servers, and alive when they die."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from smg_sglang.memory.client import MemoryConnection
from smg_sglang.memory.namespace import Namespace
from tests.e2e.conftest import (
    BASE,
    NEW_TOKENS,
    PROMPTS,
    assert_idle_and_clean,
    details,
    eventually,
    in_host_memory,
    nothing_left_behind,
    smg_state,
)
from tools.sglang_server import SglangServer

MODE = ("--enable-smg", "--enable-metrics", "--log-level", "warning")


@contextlib.contextmanager
def standalone_memory(directory):
    address = str(directory / "memory")
    process = subprocess.Popen(
        [sys.executable, "-m", "smg_sglang", "memory", "--host-gb", "0.25", "--address", address]
    )
    try:
        eventually(lambda: os.path.exists(address), "the memory server did not start")
        yield address
    finally:
        process.terminate()
        assert process.wait(timeout=20) == 0


def stats(address):
    other = Namespace(model="observer", dtype="u8", layout="none", page_size=1, page_bytes=4096)
    connection = MemoryConnection.open(address, other, timeout_s=5)
    try:
        return connection.stats(5)
    finally:
        connection.close()


@pytest.mark.timeout(600)
def test_servers_share_prefixes_and_a_killed_one_leaves_them(tiny_model, tmp_path, reference):
    with nothing_left_behind(), standalone_memory(tmp_path) as address:
        args = (*BASE, *MODE, "--smg-memory", f"ipc://{address}")
        first, second = (SglangServer(tiny_model, args) for _ in range(2))
        try:
            first.wait_ready()
            second.wait_ready()
            for prompt, expected in zip(PROMPTS[:4], reference, strict=False):
                assert first.generate(prompt, NEW_TOKENS)["output_ids"] == expected
            in_host_memory(first, sum(len(prompt) // 16 for prompt in PROMPTS[:4]))

            for prompt, expected in zip(PROMPTS[:4], reference, strict=False):
                result = second.generate(prompt, NEW_TOKENS)
                assert result["output_ids"] == expected
                assert details(result)["host"] >= len(prompt) // 16 * 16 - 16

            for process in first.processes():
                process.send_signal(signal.SIGKILL)
            first.stop()
            eventually(lambda: smg_state(second)["memory"]["leases"] == 0, "leases of the dead")

            first = SglangServer(tiny_model, args).wait_ready()
            result = first.generate(PROMPTS[0], NEW_TOKENS)
            assert result["output_ids"] == reference[0]
            assert details(result)["host"] >= len(PROMPTS[0]) // 16 * 16 - 16, "no warm restart"
            assert_idle_and_clean(first)
        finally:
            first.stop()
            second.stop()
        eventually(lambda: stats(address).connections <= 1, "connections of the dead")
        left = stats(address)
        assert (left.leases, left.reservations, left.pages_writing) == (0, 0, 0)
        assert left.pages_ready > 0
