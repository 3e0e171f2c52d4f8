"""The results as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench.serving.report import NAMES
from bench.serving.subjects import HICACHE, SMG, STOCK

Result = dict[str, Any]
COLOURS = {STOCK: "#8a8f98", SMG: "#2467c9", HICACHE: "#d98324"}
TIERS = {"cold": "computed", "device": "on the device", "host": "in host memory"}
TITLES = {"chats": "chats", "documents": "documents", "no_reuse": "no reuse"}


def plot(results: Result, path: Path) -> None:
    """Write a PNG with a panel for each question that this run answers."""
    phases = results["phases"]
    reuse = {name: phases[name] for name in ("chats", "documents") if name in phases}
    panels = []
    if "prefix" in phases:
        panels.append(lambda axes: _prefix(axes, phases["prefix"]))
    if reuse:
        panels += [lambda axes: _ttft(axes, reuse), lambda axes: _hits(axes, reuse)]
    if "no_reuse" in phases:
        panels.append(lambda axes: _no_reuse(axes, phases["no_reuse"]))
    if not panels:
        return
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(6.2 * columns, 4.2 * rows), squeeze=False, layout="constrained"
    )
    for axes, panel in zip(grid.flat, panels, strict=False):
        panel(axes)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(_subtitle(results), fontsize=9, color="#555555")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _subtitle(results: Result) -> str:
    machine, options = results["machine"], results["options"]
    device = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    return (
        f"{Path(options['model_path']).name} {options['dtype']}, device pool "
        f"{options['pool_tokens']:,} tokens; {device}; "
        f"SGLang {machine['versions']['sglang']}; {machine['date'][:10]}"
    )


def _prefix(axes: Axes, result: Result) -> None:
    """Every ask as a dot, medians as bars, on a logarithmic scale."""
    bars = [
        (subject, tier, row[tier])
        for subject, row in result["subjects"].items()
        for tier in TIERS
        if row.get(tier)
    ]
    for place, (subject, tier, figures) in enumerate(bars):
        median = figures["p50"] * 1e3
        dots = [row["ttft_s"] * 1e3 for row in _asks(result["subjects"][subject], tier)]
        axes.bar(place, median, width=0.7, color=COLOURS[subject], alpha=0.75)
        axes.scatter([place] * len(dots), dots, s=9, color="black", alpha=0.5, zorder=3)
        _label(axes, f"{median:,.0f} ms", place, max([median, *dots]))
    axes.set_yscale("log")
    axes.set_ylim(top=axes.get_ylim()[1] * 1.6)
    labels = [f"{NAMES[subject]}\n{TIERS[tier]}" for subject, tier, _ in bars]
    axes.set_xticks(range(len(bars)), labels, fontsize=8)
    axes.set_ylabel("TTFT, ms (log)")
    axes.set_title("A 2,000-token prefix: median and every ask", loc="left", fontsize=11)


def _asks(row: Result, tier: str) -> list[Result]:
    return [ask for ask in row["asks"] if ask["tier"] == tier and ask["expected"] != "filler"]


def _ttft(axes: Axes, phases: Result) -> None:
    """Mean as a bar, p50 and p99 as marks."""
    subjects = _subjects(phases)
    width = 0.8 / len(subjects)
    for number, subject in enumerate(subjects):
        for place, result in enumerate(phases.values()):
            ttft = {k: v * 1e3 for k, v in result["subjects"][subject]["ttft_s"].items()}
            x = place + (number - (len(subjects) - 1) / 2) * width
            label = NAMES[subject] if place == 0 else None
            axes.bar(x, ttft["mean"], width * 0.92, color=COLOURS[subject], label=label)
            axes.plot([x, x], [ttft["p50"], ttft["p99"]], color="black", lw=1)
            axes.plot(x, ttft["p50"], "_", color="black", ms=10)
            axes.plot(x, ttft["p99"], "v", color="black", ms=4)
            _label(axes, f"{ttft['mean']:,.0f}", x, 0)
    axes.set_xticks(range(len(phases)), [TITLES[name] for name in phases])
    axes.set_ylabel("TTFT, ms")
    axes.set_title(
        "Working set 4x the device pool: mean (bar), p50 to p99", loc="left", fontsize=11
    )
    axes.legend(frameon=False, fontsize=9)


def _hits(axes: Axes, phases: Result) -> None:
    """Hit tokens by tier, stacked; the line is a cache that never forgets."""
    subjects = _subjects(phases)
    width = 0.8 / len(subjects)
    for place, result in enumerate(phases.values()):
        for number, subject in enumerate(subjects):
            row = result["subjects"][subject]
            x = place + (number - (len(subjects) - 1) / 2) * width
            device = row["hit_share"].get("device", 0) * 100
            host = row["hit_share"].get("host", 0) * 100
            colour = COLOURS[subject]
            label = NAMES[subject] if place == 0 else None
            axes.bar(x, device, width * 0.92, color=colour, label=label and f"{label}: device")
            axes.bar(
                x,
                host,
                width * 0.92,
                bottom=device,
                color=colour,
                alpha=0.45,
                label=f"{label}: host" if label and subject != STOCK else None,
            )
            _label(axes, f"{device + host:.0f}%", x, 0)
        infinite = next(iter(result["subjects"].values()))["infinite_hit_share"] * 100
        axes.hlines(infinite, place - 0.45, place + 0.45, color="black", ls="--", lw=1)
        _label(axes, f"a cache without end: {infinite:.1f}%", place, infinite)
    axes.set_ylim(0, 118)
    axes.set_xticks(range(len(phases)), [TITLES[name] for name in phases])
    axes.set_ylabel("prompt tokens found, %")
    axes.set_title("Hits by tier", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper left")


def _no_reuse(axes: Axes, result: Result) -> None:
    """Each repeat of each server over stock's median, so that 1% can be seen."""
    keys = {"tokens_per_s": "throughput", "itl_s": "inter-token latency", "ttft_s": "TTFT"}
    subjects = list(result["subjects"])
    for number, subject in enumerate(subjects):
        for place, key in enumerate(keys):
            stock = result["subjects"][STOCK][key]["p50"]
            values = [
                (row[key] / stock - 1) * 100 for row in result["subjects"][subject]["repeats"]
            ]
            x = place + (number - (len(subjects) - 1) / 2) * 0.28
            label = NAMES[subject] if place == 0 else None
            axes.scatter([x] * len(values), values, s=12, color=COLOURS[subject], alpha=0.5)
            middle = (result["subjects"][subject][key]["p50"] / stock - 1) * 100
            axes.hlines(middle, x - 0.1, x + 0.1, color=COLOURS[subject], lw=2.5, label=label or "")
    axes.axhspan(-1, 1, color="#4caf50", alpha=0.2, lw=0, label="within 1% of stock")
    axes.set_xticks(range(len(keys)), list(keys.values()))
    axes.set_ylabel("difference to stock's median, %")
    axes.set_title("No reuse: repeats in turn, and their medians", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=9)


def _label(axes: Axes, text: str, x: float, y: float) -> None:
    """Text just above a point; readable on any colour."""
    axes.annotate(
        text,
        (x, y),
        (0, 4),
        textcoords="offset points",
        ha="center",
        fontsize=8.5,
        bbox={"boxstyle": "round,pad=0.15", "color": "white", "alpha": 0.75, "lw": 0},
    )


def _subjects(phases: Result) -> list[str]:
    """In the order of the run."""
    return list(next(iter(phases.values()))["subjects"])
