"""`make readme`: the README's measured table, written from the records between two markers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.suite.figures import Line, figure_from, lines
from bench.suite.parts import parts
from bench.suite.records import RESULTS, Record, latest

README = Path(__file__).parents[2] / "README.md"
BEGIN = "<!-- measured: begin; `make readme` writes what is between -->"
END = "<!-- measured: end -->"


def table(found: Iterable[Line]) -> list[str]:
    """Markdown; a workload's name stands only in its first row."""
    rows = ["| workload | figure | baseline | SMG |", "|---|---|---|---|"]
    for workload, group in groupby(found, key=lambda line: line.workload):
        for number, line in enumerate(group):
            name = "" if number else workload
            rows.append(f"| {name} | {line.what} | {line.baseline} | {line.ours} |")
    return rows


def headline(records: Sequence[Record]) -> str:
    """Machine, versions, date, load and how often."""
    machines = [record["machine"] for record in records]
    last, versions = machines[-1], machines[-1]["versions"]
    loads = [load for record in records for part in record["parts"] for load in part["load"]]
    commits = sorted({str(machine["commit"]) for machine in machines})
    runs = "one run" if len(records) == 1 else f"{len(records)} runs: medians [smallest .. largest]"
    what = "make bench-all ARGS=--quick" if records[-1]["quick"] else "make bench-all"
    return (
        f"`{what}`, {last['date'][:10]}, commit {', '.join(commits)}, {runs}. "
        f"{last['gpu'] or last['cpu']}, {last['cores']} cores, {last['memory_gib']} GiB"
        f"{'' if last['gpu'] else ', no GPU'}; SGLang {versions['sglang']}, torch "
        f"{versions['torch']}, Python {last['python']}. Load average "
        f"{min(loads):.1f} to {max(loads):.1f}. The baseline is stock SGLang on the same machine, "
        f"with the same attention backend, unless the row names another."
    )


def failures(records: Sequence[Record]) -> list[str]:
    """Parts that did not end well, or that no run has, one line each with the reason."""
    ran = {part["name"] for record in records for part in record["parts"]}
    failed = [
        f"- {part['name']}: {part['status']}, {reason(part)} ({record['machine']['date'][:16]})"
        for record in records
        for part in record["parts"]
        if part["status"] != "ok"
    ]
    return failed + [f"- {part.name}: not run" for part in parts() if part.name not in ran]


def reason(part: dict[str, Any]) -> str:
    """The first clause of what happened: the rest is where the logs are on that machine."""
    return str(part["detail"]).split(";", 1)[0] or "no reason given"


def render(records: Sequence[Record]) -> str:
    """What stands between the markers."""
    if not records:
        return "No run is recorded: `make bench-all`."
    runs = [
        [figure_from(row) for part in record["parts"] for row in part["figures"]]
        for record in records
    ]
    said = [headline(records), "", *table(lines(runs))]
    if failed := failures(records):
        said += ["", "Did not end well, or was not run:", "", *failed]
    return "\n".join(said)


def replaced(readme: str, text: str) -> str:
    """The README with `text` between its markers.

    Raises:
        ValueError: a marker is missing.
    """
    if BEGIN not in readme or END not in readme:
        raise ValueError(f"the README needs the lines {BEGIN!r} and {END!r}")
    before, rest = readme.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="make readme", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where it differs")
    options = parser.parse_args(arguments)
    before = README.read_text()
    after = replaced(before, render(latest(options.results)))
    if options.check:
        return int(before != after)
    README.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
