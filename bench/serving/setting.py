"""What every benchmark of servers does before it starts, and keeps of how it was called."""

from __future__ import annotations

import os
import signal
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from rich.console import Console


def open_console(width: int = 120) -> Console:
    """The console of a benchmark, `width` columns wide where its output goes to a file.

    The servers are stopped on the way out, so SIGTERM is made a way out.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return Console(width=None if sys.stdout.isatty() else width)


def server_parser(
    prog: str, description: str | None, out: Path | None, told: str, host_gb: float = 2.0
) -> ArgumentParser:
    """The flags of all benchmarks that start two servers of their own and compare them."""
    parser = ArgumentParser(prog=prog, description=description)
    add = parser.add_argument
    add("--model-path", help="a model folder or hub name (default: the demo model)")
    add("--dtype", default="bfloat16", help="of weights and KV (bfloat16)")
    add(
        "--host-gb",
        type=float,
        default=host_gb,
        help=f"GiB of host memory for pages ({host_gb:g})",
    )
    add("--server-args", default="", help="more flags for both servers, as one string")
    add("--out", type=Path, default=out, help=f"the JSON file{told}")
    return parser


def choose_model(options: Namespace) -> None:
    """The demo model where none is asked for; a local folder needs no hub."""
    if options.model_path is None:
        from tools.demo_model import demo_model

        options.model_path = str(demo_model())
    os.environ.setdefault("HF_HUB_OFFLINE", "1" if Path(options.model_path).is_dir() else "0")


def shown(options: Namespace) -> dict[str, Any]:
    """The options as the JSON holds them."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
