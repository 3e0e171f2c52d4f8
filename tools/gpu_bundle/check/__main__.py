"""`bash smg-bundle/check.sh OUT`: every step within its seconds, whatever became of the others.

Where a step fails the next goes on; the exit status says how many did.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tools.gpu_bundle.check import reuse
from tools.gpu_bundle.check.limits import limited
from tools.gpu_bundle.check.scale import DRY, H100, Scale
from tools.gpu_bundle.check.steps import ROOT, Commands
from tools.gpu_bundle.check.table import Table

#: In this order, with the seconds that each may take on an H100.
SECONDS = {
    "environment": 5,
    "compileall": 20,
    "tests": 60,
    "copies": 40,
    "servers": 70,
    "reuse": 150,
    "context": 80,
    "split": 40,
}
#: After which the servers are booted and stopped: the step that asks them.
ASKED = "reuse"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="check.sh", description=__doc__)
    add = parser.add_argument
    add("out", type=Path, help="the folder of table, logs and raw results")
    add("--only", choices=list(SECONDS), help="one step; servers and reuse are one")
    add("--dry-run", action="store_true", help="all steps on a CPU, with the tiny model")
    options = parser.parse_args(arguments)
    options.out = options.out.absolute()
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    os.chdir(ROOT)
    (options.out / "logs").mkdir(parents=True, exist_ok=True)
    return Check(DRY if options.dry_run else H100, options.out).run(options.only)


class Check:
    """One run of the steps; `failed` of them did."""

    def __init__(self, scale: Scale, out: Path) -> None:
        self._scale, self._out = scale, out
        self._table = Table(out)
        self.failed = 0

    def run(self, only: str | None) -> int:
        commands = Commands(self._scale, self._out, self._table)
        for name in SECONDS:
            if only is not None and name != only and {only, name} != {"servers", ASKED}:
                continue
            if name == "servers":
                self._with_servers()
            elif name != ASKED:
                self._step(name, getattr(commands, name))
        return self.failed

    def _with_servers(self) -> None:
        """Boots, asks twice, stops."""
        with ExitStack() as stack:
            found: reuse.Servers = {}

            def boot(seconds: float) -> None:
                logs = self._out / "logs"
                found.update(
                    stack.enter_context(reuse.servers(self._scale, logs, seconds, self._table))
                )

            self._step("servers", boot)
            if found:
                self._step(ASKED, lambda _: self._ask(found))

    def _ask(self, servers: reuse.Servers) -> None:
        for turn in (1, 2):
            raw = reuse.ask(servers, self._scale, self._table, turn)
            (self._out / f"reuse-{turn}.json").write_text(json.dumps(raw) + "\n")

    def _step(self, name: str, do: Callable[[float], None]) -> None:
        """Never raises but for the user's own interrupt: what failed is a row."""
        seconds, began = SECONDS[name] * self._scale.stretch, time.monotonic()
        try:
            with limited(seconds + 10):  # a command is stopped before, and says more
                do(seconds)
            outcome = "done"
        except Exception as error:
            self.failed += 1
            outcome = f"FAILED: {type(error).__name__}: {error}"
        self._table.row(name, "the step", f"{outcome} ({time.monotonic() - began:.0f} s)")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
