"""`python -m tools.cost_picture`: draws docs/cost.png, what `smg_sglang plan` says by context."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from smg_sglang.plan.cli import DEFAULT
from smg_sglang.plan.shape import decode_shape
from smg_sglang.plan.ways import ways

PICTURE = Path(__file__).parents[1] / "docs" / "cost.png"
CONTEXTS = [int(context) for context in np.geomspace(8192, 1 << 20, 60)]


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharex=True)
    for axis, model in zip(axes, ("llama-3.1-8b", "deepseek-v2-lite"), strict=True):
        shape = decode_shape(model)
        lines: dict[str, list[float]] = {}
        for context in CONTEXTS:
            for way in ways(shape, DEFAULT, context, 1):
                step = float("nan") if way.step_s is None else 1000 * way.step_s
                lines.setdefault(way.name, []).append(step)
        for name, values in lines.items():
            axis.plot(CONTEXTS, values, label=name)
        axis.set(xscale="log", yscale="log", title=model, xlabel="tokens of context")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("ms a token, one request")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110)
    print(PICTURE)


if __name__ == "__main__":
    main()
