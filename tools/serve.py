"""`make serve`: an SGLang server with our flag in the foreground, and a word when it is ready."""

import argparse
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import FrameType

from tools.demo_model import demo_model

PR_SET_PDEATHSIG = 1
SECONDS_BETWEEN_PROBES = 1.0


def main(arguments: list[str]) -> int:
    """Serves until the server ends or a signal ends it; returns the exit status."""
    given = _read(arguments)
    if (trouble := port_trouble(given.host, given.port)) is not None:
        print(trouble, file=sys.stderr)
        return 1
    model = given.model_path or str(demo_model())
    if Path(model).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    command = [sys.executable, "-m", "sglang.launch_server", "--enable-smg"]
    command += ["--host", given.host, "--port", str(given.port), "--model-path", model]
    command += given.rest
    return Foreground(command).run(f"http://{given.host}:{given.port}")


def _read(arguments: list[str]) -> argparse.Namespace:
    """Our defaults, where the user says nothing else; `rest` is for the server."""
    parser = argparse.ArgumentParser(prog="make serve", add_help=False, allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--model-path", "--model")
    given, rest = parser.parse_known_args(arguments)
    given.rest = rest
    return given


def port_trouble(host: str, port: int) -> str | None:
    """A sentence if someone else holds the port: their /health would pass for our server's."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return (
                f"Cannot serve on {host}:{port} ({error.strerror}): try ARGS='--port {port + 1}'."
            )
    return None


class Foreground:
    """A server that ends when we end, in a session of its own.

    A terminal sends Ctrl-C to a whole process group, and every process of the server would print
    a traceback of its own. So the signal stops here, and the server is asked once, by SIGTERM; a
    second one kills it.
    """

    def __init__(self, command: list[str]) -> None:
        self._stopping = False
        self._server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_die_with_parent,  # noqa: PLW1509 -- there is only this thread
        )
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._stop)

    def run(self, url: str) -> int:
        """Announces `url` when it is healthy, then waits; the server's exit status, 0 if asked."""
        self._announce_when_ready(url)
        status = self._server.wait()
        if self._stopping:
            return 0
        return status if status >= 0 else 128 - status  # killed by a signal: as shells say it

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._stopping:
            os.killpg(self._server.pid, signal.SIGKILL)
        else:
            self._stopping = True
            self._server.terminate()

    def _announce_when_ready(self, url: str) -> None:
        while self._server.poll() is None and not self._stopping:
            if is_healthy(url):
                print(READY.format(url=url), flush=True)
                return
            time.sleep(SECONDS_BETWEEN_PROBES)


READY = """
Ready on {url} -- Ctrl-C stops it. Try, in another terminal:

  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{{
    "model": "demo", "max_tokens": 40, "temperature": 0,
    "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'
"""


def is_healthy(url: str) -> bool:
    """Whether the server answers /health with 200; no proxy is asked, the server is ours."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _die_with_parent() -> None:
    """Runs in the child before exec, so that even SIGKILL to us leaves no server behind."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
