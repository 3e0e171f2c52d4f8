"""The storage process of a memory server: a child that is kept running and never outlives it."""

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from smg_sglang.errors import ConfigError
from smg_sglang.memory.address import Address

log = logging.getLogger(__name__)

#: What the child writes once it listens.
READY = b"ready"

_FIRST_BACKOFF_S = 0.5
_LAST_BACKOFF_S = 30.0
_STEADY_S = 60.0  # after this long the next death counts as the first again
#: Importing SGLang takes seconds, on a busy machine many.
READY_S = 120.0


class StorageProcess:
    """Starts `python -m smg_sglang storage` and starts it again when it dies; while there is none,
    storage is a miss. The child ends when its end of a socket pair does, however we die."""

    def __init__(
        self,
        address: Address,
        name: str,
        config: str | None,
        started: Callable[[ConfigError | None], None],
    ) -> None:
        """
        Args:
            name, config: SGLang's backend, and its settings.
            started: told once, on a thread of this object's, that the child listens, or why it
                could not be started; then there is no other try.
        """
        self._started = started
        self._command = [sys.executable, "-m", "smg_sglang", "storage"]
        self._command += ["--address", address.directory, "--storage", name]
        self._command += [] if config is None else ["--storage-config", config]
        self._stopping = threading.Event()
        self._changing = threading.Lock()  # between a restart and stop
        self._child: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None
        self._supervisor = threading.Thread(
            target=self._supervise, name="smg-storage-process", daemon=True
        )

    def start(self) -> None:
        """Start the child; returns at once. Raises ConfigError."""
        try:
            self._spawn()
        except OSError as error:
            raise ConfigError(f"the storage process cannot be started: {error}") from error
        self._supervisor.start()

    def stop(self, timeout_s: float = 2.0) -> None:
        """End the child; idempotent."""
        self._stopping.set()
        with self._changing:
            if self._line is not None:
                with contextlib.suppress(OSError):
                    self._line.shutdown(socket.SHUT_RDWR)  # wakes who waits for its first word
                self._line.close()
            if self._child is not None:
                try:
                    self._child.wait(timeout_s)
                except subprocess.TimeoutExpired:
                    self._child.kill()
                    self._child.wait()
        if self._supervisor.is_alive():
            self._supervisor.join()

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._child = subprocess.Popen(
                    [*self._command, "--parent-fd", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    # One copy at a time needs no pool of threads.
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
            except BaseException:
                ours.close()
                raise
        self._line = ours

    def _await_ready(self) -> ConfigError | None:
        assert self._line is not None
        self._line.settimeout(READY_S)
        try:
            word = self._line.recv(len(READY))
        except OSError:
            word = b""
        if word == READY:
            return None
        return ConfigError(
            "the storage process did not start (its message stands above); check "
            "--smg-storage-config"
        )

    def _supervise(self) -> None:
        failure = self._await_ready()
        if self._stopping.is_set():
            return
        self._started(failure)
        if failure is not None:
            return
        backoff_s = _FIRST_BACKOFF_S
        while self._child is not None:
            started = time.monotonic()
            code = self._child.wait()
            if time.monotonic() - started > _STEADY_S:
                backoff_s = _FIRST_BACKOFF_S
            if self._stopping.is_set():
                return
            log.warning("the storage process ended (exit code %s); starting another", code)
            if self._stopping.wait(backoff_s):
                return
            backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)
            self._restart()

    def _restart(self) -> None:
        with self._changing:
            if self._stopping.is_set():
                return
            if self._line is not None:
                self._line.close()
            try:
                self._spawn()
            except OSError as error:  # no memory or no descriptors now: there may be later
                log.warning("cannot start a storage process now, trying on: %r", error)
