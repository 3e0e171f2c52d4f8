"""The README's picture: how long people wait for an answer to begin, stock beside ours."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from PIL import Image

from bench.suite.figures import Figure

WHAT = "TTFT mean"
COLOURS = {"stock": "#8a8f98", "ours": "#2467c9"}
#: Where the picture keeps what it shows, so that one that is out of date is found.
KEPT = "smg_sglang effect"


@dataclass(frozen=True)
class Shown:
    """A workload of the picture.

    Attributes:
        begins: how its name in the records begins; the rest are sizes.
        name, detail: for people who know nothing of the benchmarks.
    """

    begins: str
    ends: str
    name: str
    detail: str


#: In the order of the picture; the last has next to nothing to find again.
SHOWN = (
    Shown("", "chats of 8 turns", "Chats", "19 that take turns, 8 turns each"),
    Shown("", "documents of 2,000 tokens", "Documents", "8, with 6 questions each"),
    Shown("sessions.tgz", "", "Coding agents", "recorded sessions, replayed"),
    Shown("conversation_trace.jsonl.gz", "", "Mixed traffic", "recorded; hardly anything repeats"),
)


@dataclass(frozen=True)
class Effect:
    """Mean seconds to the first token; medians over runs."""

    name: str
    detail: str
    stock: float
    ours: float


def effects(runs: Iterable[Iterable[Figure]]) -> list[Effect]:
    """Of each workload shown that any run has."""
    figures = [figure for run in runs for figure in run if figure.what == WHAT]
    found = []
    for shown in SHOWN:
        pairs = [
            (figure.baseline, figure.ours)
            for figure in figures
            if figure.workload.startswith(shown.begins) and shown.ends in figure.workload
        ]
        stock = [baseline for baseline, _ in pairs if baseline is not None]
        ours = [value for _, value in pairs if value is not None]
        if stock and ours:
            middles = statistics.median(stock), statistics.median(ours)
            found.append(Effect(shown.name, shown.detail, *(round(value, 4) for value in middles)))
    return found


def draw(found: Sequence[Effect], machine: str, path: Path) -> None:
    """Write the picture, and in it what it shows."""
    figure, axes = plt.subplots(figsize=(9.0, 1.0 + 0.95 * len(found)), layout="constrained")
    for place, effect in enumerate(found):
        _bars(axes, place, effect)
    axes.set_yticks(range(len(found)), [f"{one.name}\n{one.detail}" for one in found], fontsize=10)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(effect.stock for effect in found))
    axes.set_xlabel(f"seconds to the first token, mean ({machine})", fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title("How long until the answer begins?", loc="left", fontsize=13, weight="bold")
    axes.legend(frameon=False, fontsize=10, loc="upper right")
    figure.savefig(path, dpi=130, metadata={KEPT: json.dumps([asdict(one) for one in found])})
    plt.close(figure)


def _bars(axes: Axes, place: int, effect: Effect) -> None:
    both = {"stock": (effect.stock, "SGLang"), "ours": (effect.ours, "SGLang with --enable-smg")}
    for number, (whose, (seconds, label)) in enumerate(both.items()):
        y = place + 0.36 * (number - 0.5)
        axes.barh(y, seconds, 0.34, color=COLOURS[whose], label=None if place else label)
        times = effect.stock / effect.ours
        more = f"   {times:.1f} times sooner" if whose == "ours" and times >= 1.05 else ""
        axes.text(
            seconds,
            y,
            f" {seconds:.2f} s{more}",
            va="center",
            fontsize=10,
            weight="bold" if more else "normal",
        )


def drawn(path: Path) -> list[Effect]:
    """What a picture shows; nothing where there is none of ours."""
    if not path.exists():
        return []
    with Image.open(path) as picture:
        kept = json.loads(picture.info.get(KEPT, "[]"))
    return [Effect(**row) for row in kept]
