"""Kernels that numba compiles in the background, so that no request waits for the compiler."""

from __future__ import annotations

import importlib
import logging
import threading
from types import ModuleType

logger = logging.getLogger(__name__)


class KernelLoader:
    """Imports a module, which compiles its kernels or reads numba's cache, once per process, on a
    thread that ends when it is done."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._compiled: ModuleType | None = None

    def start(self) -> None:
        """Begin to compile unless that was done before; returns at once."""
        with self._lock:
            if self._thread is None:
                # Not a daemon: LLVM must not be torn down at exit while it compiles.
                self._thread = threading.Thread(target=self._run, name="smg-compile")
                self._thread.start()

    def ready(self) -> ModuleType | None:
        """The module, or None while it is being compiled or when there is no numba."""
        return self._compiled

    def wait(self) -> bool:
        """Block until compiling has ended; whether there are kernels. For tests and benchmarks."""
        self.start()
        assert self._thread is not None
        self._thread.join()
        return self._compiled is not None

    def _run(self) -> None:
        try:
            self._compiled = importlib.import_module(self._module)
        except Exception as error:
            logger.warning("no compiled copy kernels (%s); copies use torch operations", error)


copy_kernels = KernelLoader("smg_sglang.transfer.numba_rows")
fp8_kernels = KernelLoader("smg_sglang.transfer.numba_fp8")
