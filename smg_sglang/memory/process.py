"""The embedded memory server: a child process that is kept running and never outlives us."""

import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

from smg_sglang.box import GIB, check_host_bytes
from smg_sglang.config import DEFAULT_EVICTION, DEFAULT_HINT_SHARE, EvictionName, StorageName
from smg_sglang.errors import ConfigError
from smg_sglang.memory.private_dirs import MEMORY_DIRS
from smg_sglang.memory.server import READY
from smg_sglang.memory.storage_process import READY_S as STORAGE_READY_S

log = logging.getLogger(__name__)

_FIRST_BACKOFF_S = 0.2
_LAST_BACKOFF_S = 10.0
_STEADY_S = 60.0  # after this long the next death counts as the first again


class MemoryProcess:
    """Starts `python -m smg_sglang memory` in a private directory, restarts it when it dies.

    The child holds one end of a socket pair and exits when ours closes, however we die. Any
    thread may call; the supervising thread sleeps in wait().
    """

    def __init__(
        self,
        host_bytes: int,
        *,
        eviction: EvictionName = DEFAULT_EVICTION,
        hint_share: float = DEFAULT_HINT_SHARE,
        pretouch: bool = True,
        storage: StorageName | None = None,
        storage_config: str | None = None,
    ) -> None:
        """Use `start`."""
        directory, self._mark = MEMORY_DIRS.make()
        self.address = str(directory)
        self.restarts = 0
        self._host_bytes = host_bytes
        self._eviction, self._hint_share = eviction, hint_share
        self._pretouch = pretouch
        self._storage = [] if storage is None else ["--storage", storage.value]
        if storage_config is not None:
            self._storage += ["--storage-config", storage_config]
        self._stopping = threading.Event()
        self._changing = threading.Lock()  # between a restart and stop
        self._child: subprocess.Popen[bytes]
        self._line: socket.socket
        self._supervisor = threading.Thread(target=self._supervise, name="smg-memory", daemon=True)

    @classmethod
    def start(
        cls,
        host_bytes: int,
        *,
        eviction: EvictionName = DEFAULT_EVICTION,
        hint_share: float = DEFAULT_HINT_SHARE,
        pretouch: bool = True,
        storage: StorageName | None = None,
        storage_config: str | None = None,
        timeout_s: float = 30.0,
    ) -> "MemoryProcess":
        """Start and wait until it accepts connections, and for its storage process, where it is to
        have one. Raises ConfigError in one sentence."""
        check_host_bytes(host_bytes)
        MEMORY_DIRS.sweep()
        process = cls(
            host_bytes,
            eviction=eviction,
            hint_share=hint_share,
            pretouch=pretouch,
            storage=storage,
            storage_config=storage_config,
        )
        try:
            process._spawn()
            process._await_ready(timeout_s if storage is None else timeout_s + STORAGE_READY_S)
        except BaseException:
            process.stop()
            raise
        process._supervisor.start()
        return process

    @property
    def pid(self) -> int:
        """Of the server that runs now."""
        return self._child.pid

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the server and remove its directory; idempotent."""
        self._stopping.set()
        with self._changing:
            if hasattr(self, "_line"):
                self._line.close()
            if hasattr(self, "_child"):
                _end(self._child, timeout_s)
        if self._supervisor.is_alive():
            self._supervisor.join()
        shutil.rmtree(self.address, ignore_errors=True)
        if self._mark >= 0:
            os.close(self._mark)
            self._mark = -1

    def retire(self) -> None:
        """Somebody else is about to kill the child: do not start another, leave no files."""
        self._stopping.set()
        shutil.rmtree(self.address, ignore_errors=True)

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "smg_sglang", "memory", "--address", self.address]
        command += ["--host-gb", repr(self._host_bytes / GIB), "--log-level", "warning"]
        command += ["--eviction-policy", self._eviction, "--hint-share", repr(self._hint_share)]
        command += ["--parent-fd", str(theirs.fileno())]
        command += [] if self._pretouch else ["--no-pretouch"]
        command += self._storage
        with theirs:
            try:
                self._child = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
                )
            except BaseException:
                ours.close()
                raise
        self._line = ours

    def _await_ready(self, timeout_s: float) -> None:
        self._line.settimeout(timeout_s)
        try:
            word = self._line.recv(len(READY))
        except OSError:
            word = b""
        if word != READY:
            raise ConfigError(
                "the memory server did not start (its message stands above); check --smg-host-gb"
            )

    def _supervise(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while True:
            started = time.monotonic()
            code = self._child.wait()
            if time.monotonic() - started > _STEADY_S:
                backoff_s = _FIRST_BACKOFF_S
            if self._stopping.is_set():
                return
            log.warning("the memory server ended (exit code %s); starting another", code)
            backoff_s = self._keep_restarting(backoff_s)

    def _keep_restarting(self, backoff_s: float) -> float:
        """Until it works or `stop`; returns the next backoff."""
        failures = 0
        while not self._stopping.wait(backoff_s):
            backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)
            try:
                self._restart()
                break
            except Exception as error:  # no memory or no descriptors now: there may be later
                if not failures:
                    log.warning("cannot start a memory server now, trying on: %r", error)
                failures += 1
        return backoff_s

    def _restart(self) -> None:
        with self._changing:
            if not self._stopping.is_set():
                self._line.close()
                self._spawn()
                self.restarts += 1


def _end(child: subprocess.Popen[bytes], timeout_s: float) -> None:
    """The closed line asks it to go; if it does not (it may be stopped), kill it."""
    try:
        child.wait(timeout_s)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
