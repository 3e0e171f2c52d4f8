"""A replay as a picture: each request's TTFT over time, and hits by tier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from bench.serving.plot import COLOURS

Result = dict[str, Any]
OTHER = "#7a5fb0"


def plot(results: Result, path: Path) -> None:
    """Write a PNG."""
    subjects = results["subjects"]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for name, row in subjects.items():
        _over_time(left, name, row)
        _distribution(middle, name, row)
    left.set(xlabel="sent, s", ylabel="TTFT, s", yscale="log", title="each request")
    middle.set(xlabel="TTFT, s", xscale="log", ylabel="share of requests", title="TTFT")
    left.legend(frameon=False)
    for axis in (left.yaxis, middle.xaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    _hits(right, subjects)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(results["title"], fontsize=9, color="#555555")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _answered(row: Result) -> list[Result]:
    return [ask for ask in row["requests_raw"] if "ttft_s" in ask]


def _over_time(axes: Axes, name: str, row: Result) -> None:
    asks = _answered(row)
    colour = COLOURS.get(name, OTHER)
    times, ttfts = ([ask[key] for ask in asks] for key in ("at_s", "ttft_s"))
    axes.scatter(times, ttfts, s=10, color=colour, alpha=0.7, label=name)


def _distribution(axes: Axes, name: str, row: Result) -> None:
    ttfts = sorted(ask["ttft_s"] for ask in _answered(row))
    shares = [(i + 1) / len(ttfts) for i in range(len(ttfts))]
    axes.step(ttfts, shares, where="post", color=COLOURS.get(name, OTHER))


def _hits(axes: Axes, subjects: Result) -> None:
    for place, (name, row) in enumerate(subjects.items()):
        bottom = 0.0
        for tier, alpha in (("device", 1.0), ("host", 0.5), ("storage", 0.25)):
            share = row["hit_share"].get(tier, 0) * 100
            colour = COLOURS.get(name, OTHER)
            axes.bar(place, share, 0.6, bottom=bottom, color=colour, alpha=alpha)
            bottom += share
        axes.annotate(f"{bottom:.1f}%", (place, bottom), ha="center", va="bottom", fontsize=9)
    infinite = next(iter(subjects.values()))["infinite_hit_share"] * 100
    axes.axhline(infinite, color="black", ls="--", lw=1)
    axes.set_xticks(range(len(subjects)), list(subjects))
    axes.set(ylabel="prompt tokens found, %", title="hits: device (dark), host; dashed: infinite")
    axes.set_ylim(0, max(5.0, infinite * 1.2))
