"""What `smg_sglang plan` says of this machine's CPU, beside what it does.

    make bench-plan [ARGS="--help"]

The rate at which the CPU attends pages of host memory is measured with a model's heads and 32,768
tokens, as `make bench-host-attention` does it; with that rate the plan says how long attention of a
token takes for other contexts, which is then measured. Contexts take turns; medians with quartiles.
"""

from __future__ import annotations

import os

# As the CPU platform sets it; it counts only before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file

from bench.host_attention import Shape, World
from smg_sglang.attention.native.build import runnable
from smg_sglang.attention.page_attention import native
from smg_sglang.plan.cli import DEFAULT
from smg_sglang.plan.shape import decode_shape
from smg_sglang.plan.ways import ways

#: Layers that a world has, which take turns: memory for all of them would be too much.
LAYERS = 4
RATED, ASKED = 32768, (8192, 65536, 131072)
#: Query heads, KV heads, and the size of a head.
HEADS = {"llama-3.1-8b": (32, 8, 128), "qwen2.5-7b": (28, 4, 128), "smollm2-135m": (9, 3, 64)}


def layer_seconds(rounds: int, threads: int) -> dict[tuple[str, int], list[float]]:
    """Of attention in one layer, one query, by model and context: a sample a round."""
    attention = native(runnable()[0], threads)
    worlds = {
        (model, tokens): World(Shape(*HEADS[model], 16, tokens, LAYERS, torch.bfloat16))
        for model in HEADS
        for tokens in (RATED, *ASKED)
    }
    seconds: dict[tuple[str, int], list[float]] = {case: [] for case in worlds}
    for turn in range(rounds + 1):
        for case, world in worlds.items():
            began = time.perf_counter()
            world.attend(attention, turn % LAYERS)
            if turn:
                seconds[case].append(time.perf_counter() - began)
    return seconds


def report(seconds: dict[tuple[str, int], list[float]]) -> list[dict]:
    """Milliseconds a token, predicted and measured [first quartile, median, third quartile]."""
    rows = []
    for model, tokens in ((model, tokens) for model in HEADS for tokens in ASKED):
        shape = decode_shape(model)
        rated = statistics.median(seconds[model, RATED]) * shape.layers
        gbps = RATED * shape.kv_bytes / rated / 1e9
        # Attention alone: nothing is computed on a device, and nothing is sent to it.
        box = replace(
            DEFAULT,
            attention_gbps=gbps,
            device_gbps=1e12,
            device_gib=1e6,
            host_gib=1e6,
            hop_us=1e-9,
        )
        predicted = {way.name: way.step_s for way in ways(shape, box, tokens, 1)}["host attention"]
        measured = [1000 * shape.layers * s for s in
                    statistics.quantiles(seconds[model, tokens], n=4)]  # fmt: skip
        rows.append(
            {
                "model": model,
                "context": tokens,
                "predicted_ms": 1000 * predicted,
                "measured_ms": measured,
                "measured_over_predicted": measured[1] / (1000 * predicted),
                "attention_gbps": gbps,
            }
        )
    return rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=Path("bench/out/plan.json"))
    options = parser.parse_args()
    rows = report(layer_seconds(options.rounds, options.threads))
    table = Table("model", "context", "predicted ms a token", "measured", "measured / predicted")
    for row in rows:
        low, middle, high = row["measured_ms"]
        table.add_row(
            row["model"],
            str(row["context"]),
            f"{row['predicted_ms']:.1f}",
            f"{middle:.1f} ({low:.1f}-{high:.1f})",
            f"{row['measured_over_predicted']:.2f}",
        )
    console = Console()
    console.print(table)
    found = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "instruction_set": runnable()[0].name,
        "threads": options.threads,
        "load": os.getloadavg(),
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"written to {options.out}; load average {found['load'][0]:.1f} at the end")


if __name__ == "__main__":
    main()
