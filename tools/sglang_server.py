"""Start, ask and stop one SGLang server: what the end-to-end tests and the benchmarks share."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import requests

READY_TIMEOUT_S = 300.0


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class ServerDied(RuntimeError):
    """The server ended before it was ready; the message ends with its log's tail."""


class SglangServer:
    """One `python -m sglang.launch_server` process with its children.

    Attributes:
        url: where it listens.
        log: the file that holds its output.
        ready_s: seconds from start to the first healthy answer.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
        python: str | os.PathLike[str] = sys.executable,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log or Path(tempfile.mkstemp(prefix="sglang-", suffix=".log")[1])
        command = [
            *(str(python), "-m", "sglang.launch_server"),
            *("--model-path", str(model), "--host", "127.0.0.1", "--port", str(self.port)),
            *args,
        ]
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )
        self.ready_s = 0.0

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> SglangServer:
        """Return when `/health_generate` answers; raises ServerDied when it cannot."""
        began = time.monotonic()
        while time.monotonic() - began < timeout_s:
            if self._process.poll() is not None:
                raise ServerDied(f"exit code {self._process.returncode}\n{self.log_tail()}")
            try:
                if requests.get(f"{self.url}/health_generate", timeout=30).status_code == 200:
                    self.ready_s = time.monotonic() - began
                    return self
            except requests.RequestException:
                time.sleep(0.2)
        self.stop()
        raise ServerDied(f"not ready within {timeout_s:.0f} s\n{self.log_tail()}")

    def wait_exit(self, timeout_s: float) -> int:
        """The exit code of a server that ends by itself."""
        return self._process.wait(timeout=timeout_s)

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def processes(self) -> list[psutil.Process]:
        """The server and all that it started, as of now."""
        try:
            parent = psutil.Process(self.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def stop(self, timeout_s: float = 30.0) -> None:
        """SIGTERM, then SIGKILL to whatever is left; returns when all are gone."""
        family = self.processes()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=timeout_s)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=10)
        self._process.wait(timeout=10)

    # ---- asking ----

    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 16,
        timeout_s: float = 300.0,
        **fields: Any,
    ) -> dict[str, Any]:
        """`/generate` with greedy sampling; ``prompt`` is text or token ids."""
        sampling = {"max_new_tokens": max_new_tokens, "temperature": 0, "ignore_eos": True}
        body = {
            ("text" if isinstance(prompt, str) else "input_ids"): prompt,
            "sampling_params": sampling | fields.pop("sampling_params", {}),
            **fields,
        }
        answer = requests.post(f"{self.url}/generate", json=body, timeout=timeout_s)
        answer.raise_for_status()
        result: dict[str, Any] = answer.json()
        return result

    def get(self, path: str, timeout_s: float = 60.0) -> Any:
        answer = requests.get(self.url + path, timeout=timeout_s)
        answer.raise_for_status()
        return answer.json() if "json" in answer.headers.get("content-type", "") else answer.text

    def post(self, path: str, timeout_s: float = 60.0, **body: Any) -> requests.Response:
        return requests.post(self.url + path, json=body, timeout=timeout_s)

    def flush(self, timeout_s: float = 60.0) -> None:
        """`/flush_cache`, again until the server is idle enough to do it."""
        deadline = time.monotonic() + timeout_s
        while self.post("/flush_cache").status_code != 200:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the cache could not be flushed\n{self.log_tail()}")
            time.sleep(0.1)


@contextmanager
def running_server(
    model: str | os.PathLike[str],
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
    python: str | os.PathLike[str] = sys.executable,
) -> Iterator[SglangServer]:
    """A ready server, stopped at the end of the block."""
    server = SglangServer(model, args, env, log, python)
    try:
        yield server.wait_ready()
    finally:
        server.stop()
