"""Extraction with examples: every record of a task shares the task's long prompt.

Uses `gen` with a stop, with a regular expression and with choices, and `run_batch`.
"""

from __future__ import annotations

import random

import sglang as sgl

from bench.programs.endpoint import CountingEndpoint
from bench.programs.texts import KINDS, Record, record

TASKS, EXAMPLES = 4, 10


@sgl.function
def extract(s, examples: str, note: str):
    """Name, year and kind of one note."""
    s += examples + f"Note: {note}\nName:"
    s += sgl.gen("name", max_tokens=8, stop="\n")
    s += "\nYear: " + sgl.gen("year", max_tokens=6, regex="[0-9]{4}")
    s += "\nKind:" + sgl.gen("kind", choices=[f" {kind}" for kind in KINDS])


def solved(example: Record) -> str:
    """A note with its answers, in the form in which they are wanted."""
    return (
        f"Note: {example.note}\nName: {example.name}\nYear: {example.year}\n"
        f"Kind: {example.kind}\n\n"
    )


def arguments(tasks: int, records: int, seed: int = 1) -> list[dict[str, str]]:
    """One record of each task in turn, so that no task's prompt stays on a small device."""
    rng = random.Random(seed)
    prompts = [
        f"Task {task}: read the note and answer.\n\n"
        + "".join(solved(record(rng)) for _ in range(EXAMPLES))
        for task in range(tasks)
    ]
    return [{"examples": p, "note": record(rng).note} for _ in range(records) for p in prompts]


def run(backend: CountingEndpoint, size: int) -> list[str]:
    """`size + 1` records of each task; the answers."""
    work = arguments(TASKS, size + 1)
    states = extract.run_batch(work, temperature=0, num_threads=2, backend=backend)
    return ["|".join((s["name"], s["year"], s["kind"])) for s in states]
