"""`make bench-all`: every benchmark in turn; what failed is shown, and each run is recorded."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.serving import machine
from bench.serving.setting import open_console
from bench.suite import records
from bench.suite.child import GRACE_S, Outcome, run
from bench.suite.figures import Figure, figure_from, lines
from bench.suite.parts import BENCH, Part, parts

MARKS = {"ok": "green", "not run": "yellow", "failed": "red", "timed out": "red"}
#: `smg_sglang`, `bench` and `tools` of this copy, in the children and in the servers they start.
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(filter(None, [str(BENCH.parent), os.environ.get("PYTHONPATH")]))
}


def parse(arguments: list[str]) -> argparse.Namespace:
    names = [part.name for part in parts()]
    parser = argparse.ArgumentParser(prog="make bench-all", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="rough figures, under 20 minutes on 2 cores")
    add("--minutes", type=float, help="stop after these (quick: 20, else 60)")
    add("--only", nargs="+", choices=names, default=names, help="default: all")
    add("--out", type=Path, default=BENCH / "out" / "all", help="raw JSON and logs (bench/out/all)")
    add("--results", type=Path, default=records.RESULTS, help="records (bench/results)")
    add("--no-record", action="store_true", help="show the figures, keep nothing")
    options = parser.parse_args(arguments)
    options.minutes = options.minutes or (20.0 if options.quick else 60.0)
    return options


def run_part(part: Part, out: Path, left_s: float, *, quick: bool) -> dict[str, Any]:
    """One part as a record holds it; `left_s`: until the whole run has to be over."""
    load, figures = [os.getloadavg()[0]], []
    path = out / f"{part.name}.json"
    path.unlink(missing_ok=True)
    if part.needs is not None and not part.needs.exists():
        outcome = Outcome("not run", f"there is no {part.needs}")
    elif left_s < GRACE_S:
        outcome = Outcome("not run", "no time was left (--minutes)")
    else:
        command = [sys.executable, *part.arguments(quick=quick, json=path)]
        log = out / "logs" / f"{part.name}.log"
        limit_s = min(part.timeout_s(quick=quick), left_s - GRACE_S)
        outcome = run(command, log, limit_s, ENVIRONMENT)
    if path.exists():
        figures, outcome = extracted(part, path, outcome)
    load.append(os.getloadavg()[0])
    return {
        "name": part.name,
        **asdict(outcome),
        "load": [round(value, 2) for value in load],
        "figures": [asdict(figure) for figure in figures],
    }


def extracted(part: Part, path: Path, outcome: Outcome) -> tuple[list[Figure], Outcome]:
    """Figures, or a failure where the JSON is not what it should be."""
    try:
        return list(part.figures(json.loads(path.read_text()))), outcome
    except Exception as error:  # whatever it is, the other parts have to run
        return [], Outcome("failed", f"{path}: {error!r}", outcome.seconds)


def show_status(console: Console, part: dict[str, Any]) -> None:
    colour = MARKS[part["status"]]
    console.print(
        f"{part['name']:<18}[{colour}]{part['status']:<10}[/]{part['seconds']:>7.0f} s  "
        f"load {part['load'][0]:.1f}..{part['load'][1]:.1f}  {escape(part['detail'])}"
    )


def show_figures(console: Console, runs: list[dict[str, Any]]) -> None:
    """Medians over all runs of this machine today, with their spread."""
    title = f"{len(runs)} runs: medians [smallest .. largest]" if len(runs) > 1 else "this run"
    table = Table("workload", "figure", "baseline", "SMG", title=title, title_justify="left")
    rows = [[figure_from(row) for part in r["parts"] for row in part["figures"]] for r in runs]
    for line in lines(rows):
        table.add_row(line.workload, line.what, line.baseline, line.ours)
    console.print(table)


def run_all(console: Console, options: argparse.Namespace, record: dict[str, Any]) -> None:
    """All parts of `--only`, each into the record when it has ended."""
    began = time.monotonic()
    for part in parts():
        if part.name not in options.only:
            continue
        left_s = 60 * options.minutes - (time.monotonic() - began)
        limit_s = min(left_s, part.timeout_s(quick=options.quick))
        with console.status(f"{part.name}; at most {limit_s:.0f} s"):
            record["parts"].append(run_part(part, options.out, left_s, quick=options.quick))
        record["seconds"] = time.monotonic() - began
        show_status(console, record["parts"][-1])


def keep(console: Console, options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Append the record and show it with the other runs of the day; nothing if nothing ran."""
    runs = [record] if record["parts"] else []
    if runs and not options.no_record:
        path = records.append(record, options.results)
        kind = path.stem.split("-")[1]
        runs = [json.loads(p.read_text()) for p in sorted(path.parent.glob(f"*-{kind}.json"))]
        console.print(f"recorded: {path}")
    if runs:
        show_figures(console, runs)


def main(arguments: list[str]) -> int:
    """1 where a part did not end well; all are run in any case, and what ran is recorded."""
    options = parse(arguments)
    console = open_console(140)
    record: dict[str, Any] = {"machine": machine.describe(), "quick": options.quick, "parts": []}
    record["seconds"] = 0.0
    try:
        run_all(console, options, record)
    finally:
        keep(console, options, record)
    minutes = record["seconds"] / 60
    console.print(
        f"{minutes:.1f} minutes; `make readme` writes docs/measured.md and the README's picture"
    )
    return int(any(part["status"] not in ("ok", "not run") for part in record["parts"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
