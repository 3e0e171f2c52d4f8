"""One figure of one run, and how figures of several runs become one line of a table."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

#: How a unit is shown; `share` is of one.
FORMATS = {
    "s": "{:.2f} s",
    "ms": "{:,.1f} ms",
    "us": "{:,.0f} us",
    "tok/s": "{:,.0f} tok/s",
    "GB/s": "{:.1f} GB/s",
    "share": "{:.1%}",
    "x": "{:.2f}",
    "n": "{:,.0f}",
}


@dataclass(frozen=True)
class Figure:
    """What one run measured.

    Attributes:
        workload: on what, for people; figures of one workload stand together.
        baseline: stock SGLang's, or of what the workload names; None where there is none.
        ours: None where it was not measured.
    """

    workload: str
    what: str
    unit: str
    baseline: float | None
    ours: float | None

    @property
    def key(self) -> tuple[str, str, str]:
        return self.workload, self.what, self.unit


@dataclass(frozen=True)
class Line:
    """The same figure of several runs: medians, with the smallest and largest."""

    workload: str
    what: str
    baseline: str
    ours: str


def show(values: Sequence[float], unit: str) -> str:
    """`median [smallest .. largest]`; "-" for nothing."""
    if not values:
        return "-"
    form = FORMATS[unit].format
    middle = form(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} [{form(min(values))} .. {form(max(values))}]"


def lines(runs: Iterable[Iterable[Figure]]) -> list[Line]:
    """Every figure that any run has, in the order in which it was first met."""
    found: dict[tuple[str, str, str], list[Figure]] = defaultdict(list)
    for run in runs:
        for figure in run:
            found[figure.key].append(figure)
    return [_line(figures) for figures in found.values()]


def _line(figures: list[Figure]) -> Line:
    first = figures[0]
    baseline = [figure.baseline for figure in figures if figure.baseline is not None]
    ours = [figure.ours for figure in figures if figure.ours is not None]
    return Line(first.workload, first.what, show(baseline, first.unit), show(ours, first.unit))


def figure_from(row: dict[str, Any]) -> Figure:
    """A figure as a record holds it.

    Raises:
        ValueError: the unit is not known.
    """
    if row["unit"] not in FORMATS:
        raise ValueError(f"unit {row['unit']!r} is none of {', '.join(FORMATS)}: {row}")
    return Figure(row["workload"], row["what"], row["unit"], row["baseline"], row["ours"])
