"""A sweep as a picture: how much host memory buys how many hits."""

from __future__ import annotations

from pathlib import Path

from smg_sglang.errors import ConfigError
from smg_sglang.simulate.sweep import Sweep


def plot_sweep(sweep: Sweep, title: str, path: Path) -> None:
    """Write a PNG. Raises ConfigError where matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise ConfigError("no picture, which needs matplotlib: pip install matplotlib.") from None
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    for policy in dict.fromkeys(run.policy for run in sweep.runs):
        runs = [run for run in sweep.runs if run.policy == policy]
        sizes = [run.host_gb for run in runs]
        axes.plot(sizes, [run.hit_share["total"] for run in runs], marker="o", label=policy)
    first = sweep.runs[0]
    sizes = sorted(sweep.bounds.belady)
    best = [sweep.bounds.belady[size] for size in sizes]
    axes.plot(sizes, best, "k--", label="optimum (Belady, one level)")
    axes.axhline(sweep.bounds.infinite, color="k", linestyle=":", label="infinite cache")
    if sizes[0]:
        axes.set_xscale("log")
    else:
        axes.set_xscale("symlog", linthresh=min((size for size in sizes if size), default=1.0))
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("host memory, GiB")
    axes.set_ylabel("share of prompt tokens found, device and host")
    axes.set_title(
        f"{title}: {first.model}, {first.device_tokens:,} tokens on the device", fontsize=10
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
