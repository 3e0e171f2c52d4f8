import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tools import serve

ROOT = Path(__file__).parents[2]

SERVER = """
import http.server, os, signal, sys

class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *ignored): pass

signal.signal(signal.SIGTERM, {on_sigterm})
print("pid", os.getpid(), flush=True)
http.server.HTTPServer(("127.0.0.1", {port}), Health).serve_forever()
"""

PARENT = (
    "import sys; from tools.serve import Foreground; sys.exit(Foreground({command}).run({url!r}))"
)


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def foreground(port):
    """Starts `Foreground` over a small web server; returns the process and the server's pid."""
    started = []

    def start(on_sigterm="lambda *_: sys.exit(3)"):
        code = SERVER.format(port=port, on_sigterm=on_sigterm)
        url = f"http://127.0.0.1:{port}"
        code = PARENT.format(command=[sys.executable, "-c", code], url=url)
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return process, int(process.stdout.readline().split()[1])

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def wait_until_ready(process):
    for line in process.stdout:
        if line.startswith("Ready on"):
            return
    raise AssertionError("it ended without being ready")


def wait_until_gone(pid):
    """By a descriptor of the process, which gets readable when it ends: no sleeping, no polling."""
    import select

    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    assert select.select([descriptor], [], [], 10)[0], f"process {pid} is still there"
    os.close(descriptor)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ready_is_said_once_and_a_signal_ends_the_server(foreground, number):
    process, server = foreground()
    wait_until_ready(process)
    process.send_signal(number)
    rest = process.stdout.read()
    assert process.wait(10) == 0
    assert "curl" in rest
    assert "Ready on" not in rest
    wait_until_gone(server)


def test_a_server_that_does_not_listen_is_killed_by_the_second_signal(foreground):
    process, server = foreground(on_sigterm="lambda *_: print('asked', flush=True)")
    wait_until_ready(process)
    process.send_signal(signal.SIGINT)
    assert any(line == "asked\n" for line in process.stdout)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0
    wait_until_gone(server)


def test_no_server_outlives_a_killed_parent(foreground):
    process, server = foreground()
    wait_until_ready(process)
    process.kill()
    wait_until_gone(server)


def test_a_server_that_ends_by_itself_passes_on_its_status(port):
    command = [sys.executable, "-c", "raise SystemExit(7)"]
    code = PARENT.format(command=command, url=f"http://127.0.0.1:{port}")
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout) == (7, "")


def test_a_taken_port_is_refused_in_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        run = subprocess.run(
            [sys.executable, "-m", "tools.serve", "--port", str(port), "--model-path", "/none"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    assert f"--port {port + 1}" in run.stderr


def test_a_server_that_is_not_there_is_not_healthy(port):
    assert not serve.is_healthy(f"http://127.0.0.1:{port}")
