"""What every benchmark of servers does before it starts, and keeps of how it was called."""

from __future__ import annotations

import os
import signal
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from rich.console import Console


def open_console(width: int = 120) -> Console:
    """The console of a benchmark, `width` columns wide where its output goes to a file.

    The servers are stopped on the way out, so SIGTERM is made a way out.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return Console(width=None if sys.stdout.isatty() else width)


def choose_model(options: Namespace) -> None:
    """The demo model where none is asked for; a local folder needs no hub."""
    if options.model_path is None:
        from tools.demo_model import demo_model

        options.model_path = str(demo_model())
    os.environ.setdefault("HF_HUB_OFFLINE", "1" if Path(options.model_path).is_dir() else "0")


def shown(options: Namespace) -> dict[str, Any]:
    """The options as the JSON holds them."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
