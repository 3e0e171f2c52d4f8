"""`make readme`: docs/measured.md and the README's picture and figures, from the records."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.suite.effect import Effect, draw, drawn, effects
from bench.suite.figures import Figure, Line, figure_from, lines
from bench.suite.parts import parts
from bench.suite.records import RESULTS, Record, latest

ROOT = Path(__file__).parents[2]
README, RECORD, PICTURE = ROOT / "README.md", ROOT / "docs/measured.md", ROOT / "docs/effect.png"
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


def machine(records: Sequence[Record]) -> str:
    """Where the picture's figures come from, in a line."""
    last = records[-1]["machine"]
    return (
        f"SmolLM2-135M on {last['gpu'] or str(last['cores']) + ' CPU cores'}, "
        f"SGLang {last['versions']['sglang']}, "
        f"{last['date'][:10]}"
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


def runs_of(records: Sequence[Record]) -> list[list[Figure]]:
    """The figures of each run."""
    return [
        [figure_from(row) for part in record["parts"] for row in part["figures"]]
        for record in records
    ]


def render(records: Sequence[Record]) -> str:
    """What stands between the markers of the whole record."""
    if not records:
        return "No run is recorded: `make bench-all`."
    said = [headline(records), "", *table(lines(runs_of(records)))]
    if failed := failures(records):
        said += ["", "Did not end well, or was not run:", "", *failed]
    return "\n".join(said)


def summary(found: Sequence[Effect], records: Sequence[Record]) -> str:
    """What stands between the markers of the README: the picture, and its figures as words."""
    if not found:
        return "No run is recorded: `make bench-all`."
    waits = ", ".join(f"{one.name.lower()} {one.ours:.2f} s and {one.stock:.2f} s" for one in found)
    return (
        f"![How long until the answer begins]({PICTURE.relative_to(ROOT)})\n\n"
        f"Mean time to the first token with and without `--enable-smg`: {waits} "
        f"({machine(records)})."
    )


def replaced(before: str, text: str) -> str:
    """A document with `text` between its markers.

    Raises:
        ValueError: a marker is missing.
    """
    if BEGIN not in before or END not in before:
        raise ValueError(f"the document needs the lines {BEGIN!r} and {END!r}")
    head, rest = before.split(BEGIN, 1)
    _, tail = rest.split(END, 1)
    return f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="make readme", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where it differs")
    options = parser.parse_args(arguments)
    records = latest(options.results)
    found = effects(runs_of(records))
    texts = {RECORD: render(records), README: summary(found, records)}
    written = {path: replaced(path.read_text(), text) for path, text in texts.items()}
    if options.check:
        same = all(path.read_text() == text for path, text in written.items())
        return int(not same or (bool(found) and drawn(PICTURE) != found))
    for path, text in written.items():
        path.write_text(text)
    if found:
        draw(found, machine(records), PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
