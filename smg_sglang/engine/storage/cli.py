"""`python -m smg_sglang storage`: the storage process of a memory server, started by it."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys

from smg_sglang.config.storage import storage_settings
from smg_sglang.errors import ConfigError
from smg_sglang.memory.address import Address
from smg_sglang.memory.storage_process import READY
from smg_sglang.storage.service import StorageService


def main(arguments: list[str] | None = None) -> int:
    """Run until SIGTERM, or until the other end of `--parent-fd` closes; the exit code, 2 for what
    one sentence has told."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level="WARNING", format="[%(asctime)s] smg storage: %(message)s")
    try:
        address = Address.parse(options.address)
        settings = storage_settings(options.storage, options.storage_config)
        # Torch and SGLang take seconds: what is wrong with the arguments has been told before.
        import torch

        from smg_sglang.engine.storage.backend import open_backend

        torch.set_num_threads(1)
        service = StorageService(address, open_backend(options.storage, settings))
    except (ConfigError, OSError) as error:
        print(f"smg_sglang storage: {error}", file=sys.stderr)
        return 2
    if options.parent_fd is not None:
        os.write(options.parent_fd, READY)
    service.run(_end_of(options.parent_fd))
    # A call that hangs must not hold the process.
    os._exit(0)


def _end_of(parent_fd: int | None) -> int:
    """A descriptor that is readable when it is time to go."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if parent_fd is not None:
        return parent_fd
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGTERM, lambda *_: None)
    return reader


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m smg_sglang storage",
        description="Keep pages of the memory server at DIR in storage. Memory servers start it "
        "themselves: see `python -m smg_sglang memory --help`.",
    )
    parser.add_argument("--address", required=True, metavar="DIR")
    parser.add_argument("--storage", required=True, metavar="NAME")
    parser.add_argument("--storage-config", metavar="JSON")
    parser.add_argument("--parent-fd", type=int, help=argparse.SUPPRESS)
    return parser
