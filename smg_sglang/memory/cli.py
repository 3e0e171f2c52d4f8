"""`python -m smg_sglang memory`: a memory server of its own."""

import argparse
import logging
import math
import sys

from smg_sglang.box import GIB, box_memory
from smg_sglang.config import OPTIONS, EvictionName
from smg_sglang.config.flags import add_memory_flags
from smg_sglang.config.storage import storage_settings
from smg_sglang.errors import ConfigError
from smg_sglang.memory.address import Address
from smg_sglang.memory.server import run_server


def main(arguments: list[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT; returns the exit code: 2 for a wrong choice, in one sentence."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=options.log_level.upper(), format="[%(asctime)s] smg memory: %(message)s"
    )
    try:
        address = Address.parse(options.address) if options.address else Address.default()
        run_server(
            address,
            _host_bytes(options.host_gb),
            pretouch=not options.no_pretouch,
            eviction=EvictionName(options.eviction_policy),
            hint_share=OPTIONS["hint_share"].read(options.hint_share, "--hint-share"),
            storage=_storage(options),
            parent_fd=options.parent_fd,
        )
    except ConfigError as error:
        print(f"smg_sglang memory: {error}", file=sys.stderr)
        return 2
    return 0


def _storage(options: argparse.Namespace) -> tuple[str, str | None] | None:
    if options.storage is None:
        if options.storage_config is not None:
            raise ConfigError("--storage-config needs --storage; add it.")
        return None
    storage_settings(options.storage, options.storage_config)
    return options.storage, options.storage_config


def _host_bytes(host_gb: float) -> int:
    if not math.isfinite(host_gb) or host_gb <= 0:
        raise ConfigError(f"--host-gb must be a positive number of GiB, not {host_gb}")
    return int(host_gb * GIB)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m smg_sglang memory",
        description="Keep KV pages in host memory for the SGLang servers of this user on this "
        "machine. Point them here with --smg-memory ADDRESS.",
    )
    add_memory_flags(parser, host_gb=round(box_memory().available / GIB / 2, 2))
    parser.add_argument(
        "--address",
        metavar="DIR",
        help=f"private directory for its sockets, ipc://DIR or DIR (default: {Address.default()})",
    )
    parser.add_argument(
        "--no-pretouch",
        action="store_true",
        help="do not prepare memory before it is used; the first spills are slower",
    )
    parser.add_argument(
        "--log-level", choices=["debug", "info", "warning", "error"], default="info"
    )
    parser.add_argument("--parent-fd", type=int, help=argparse.SUPPRESS)
    return parser
