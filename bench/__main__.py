"""`make bench`: stock SGLang and ours on the same workloads; a table, JSON and a PNG."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bench.serving import machine, report
from bench.serving.phases import PHASES, Result, Servers, make_phases
from bench.serving.plot import plot
from bench.serving.setting import choose_model, open_console, shown
from bench.serving.subjects import HICACHE, SMG, STOCK, attention_backend, running
from tools.sglang_server import ServerDied

OUT = Path(__file__).parent / "out"


def parse(arguments: list[str]) -> argparse.Namespace:
    """Flags, with what is chosen by itself filled in."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    add = parser.add_argument
    add("--model-path", help="a model folder or hub name (default: the demo model)")
    add("--only", type=_phases, default=(), help=f"some of {','.join(PHASES)} (default: all)")
    add("--quick", action="store_true", help="fewer repeats and turns: figures are rough")
    add("--repeats", type=int, help="repeats of what takes turns (default: 16; quick: 4)")
    add("--pool-tokens", type=int, default=4096, help="tokens of the device pool (4096)")
    add("--host-gb", type=float, default=2.0, help="GiB of host memory for pages (2)")
    add("--dtype", default="bfloat16", help="of weights and KV (bfloat16)")
    add("--attention-backend", help="on all servers (default: smg on a CPU)")
    add("--hicache", action="store_true", help="SGLang's own HiCache as a third server")
    add("--server-args", default="", help="more flags for all servers, as one string")
    add("--out", type=Path, default=OUT, help="folder for JSON, PNG and logs (bench/out)")
    add("--json", type=Path, help="the JSON file (default: OUT/serving.json)")
    options = parser.parse_args(arguments)
    options.attention_backend = attention_backend(options.attention_backend)
    options.json = options.json or options.out / "serving.json"
    return options


def _phases(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if unknown := [name for name in names if name not in PHASES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(PHASES)}")
    return names


def main(arguments: list[str]) -> int:
    """Run all phases; 0 whatever the figures are."""
    options = parse(arguments)
    console = open_console()
    choose_model(options)
    began = time.monotonic()
    results: dict[str, Any] = {
        "machine": machine.describe(),
        "options": shown(options),
    }
    subjects = [STOCK, SMG, *([HICACHE] if options.hicache else [])]
    with ExitStack() as stack:
        with console.status(f"starting {len(subjects)} servers; this takes about a minute"):
            servers = stack.enter_context(running(subjects, options, options.out / "logs"))
        results["phases"] = run_phases(console, servers, options)
    results["seconds"] = time.monotonic() - began
    finish(console, results, options)
    return 0


def run_phases(console: Console, servers: Servers, options: argparse.Namespace) -> Result:
    """Each phase under a progress bar, its table when it is done."""
    done: Result = {}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    for phase in make_phases(options):
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task(phase.title, total=phase.steps(servers))
            done[phase.name] = phase.run(servers, lambda bar=bar, task=task: bar.advance(task))
        report.print_phase(console, phase.name, done[phase.name])
    return done


def finish(console: Console, results: Result, options: argparse.Namespace) -> None:
    """Verdicts, JSON and PNG."""
    found = report.verdicts(results["phases"])
    results["verdicts"] = [vars(verdict) for verdict in found]
    report.print_verdicts(console, found)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    picture = options.json.with_suffix(".png")
    plot(results, picture)
    console.print(f"{options.json}\n{picture}")
    console.print(
        f"{results['seconds'] / 60:.1f} minutes, load average {os.getloadavg()[0]:.1f} at the end"
    )


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ServerDied as error:
        sys.exit(f"A server did not start: {error}")
