"""`make bench-context`: a context four times the device pool, beside a pool that holds all of it.

Both servers have the same cores, chunks and host memory and take turns; only the pool differs, and
that one of them streams (`--smg-stream-context`). Each prompt is new to both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.serving import machine
from bench.serving.client import Answer, Client
from bench.serving.setting import choose_model, open_console, server_parser, shown
from bench.serving.statistics import compare, spread
from bench.serving.subjects import start_smg, started
from bench.serving.workloads import words
from tools.sglang_server import SglangServer

OUT = Path(__file__).parent / "out"
POOL, STREAMED = "all in the pool", "streamed"
TARGETS = {"prefill": 0.85, "decode": 0.70}


def parse(arguments: list[str]) -> argparse.Namespace:
    out, told = OUT / "context.json", "; the PNG lies beside"
    parser = server_parser("make bench-context", __doc__, out, told)
    add = parser.add_argument
    add("--tokens", type=int, default=7936, help="tokens of a prompt (7936)")
    add("--share", type=int, default=4, help="prompt tokens a token of the small pool (4)")
    add("--answer", type=int, default=64, help="tokens of an answer (64)")
    add("--repeats", type=int, default=4, help="prompts to each server (4)")
    add("--quick", action="store_true", help="2 repeats")
    add("--chunk", type=int, default=1024, help="--chunked-prefill-size of both (1024)")
    options = parser.parse_args(arguments)
    if options.quick:
        options.repeats = min(options.repeats, 2)
    options.pool_tokens = options.tokens // options.share
    return options


def start(options: argparse.Namespace, name: str) -> SglangServer:
    """A server; only pool and streaming differ."""
    pool = options.pool_tokens if name == STREAMED else options.tokens + 1024
    args = ["--max-total-tokens", str(pool), "--chunked-prefill-size", str(options.chunk)]
    if name == STREAMED:
        args.append("--smg-stream-context")
    return start_smg(options, f"context-{name}", args)


async def ask(server: SglangServer, prompt: Sequence[int], answer_tokens: int) -> Answer:
    async with Client(server.url) as client:
        return await client.ask(prompt, answer_tokens)


def measure(
    console: Console, servers: dict[str, SglangServer], options: argparse.Namespace
) -> dict[str, list[Answer]]:
    """In turns, and who goes first changes."""
    answers: dict[str, list[Answer]] = {name: [] for name in servers}
    rng = random.Random(1)
    for server in servers.values():
        asyncio.run(ask(server, words(rng, 600), 8))
    for repeat in range(options.repeats):
        prompt = words(rng, options.tokens)
        order = list(servers) if repeat % 2 else list(servers)[::-1]
        for name in order:
            with console.status(f"repeat {repeat + 1} of {options.repeats}: {name}"):
                answers[name].append(asyncio.run(ask(servers[name], prompt, options.answer)))
    return answers


def summarise(answers: dict[str, list[Answer]], options: argparse.Namespace) -> dict[str, Any]:
    speeds = {
        name: {
            "prefill": [options.tokens / answer.ttft_s for answer in given],
            "decode": [len(answer.gaps_s) / sum(answer.gaps_s) for answer in given],
        }
        for name, given in answers.items()
    }
    return {
        "speeds": speeds,
        "spread": {n: {k: spread(v) for k, v in kinds.items()} for n, kinds in speeds.items()},
        "streamed_over_pool": {
            kind: compare(speeds[STREAMED][kind], speeds[POOL][kind]) for kind in TARGETS
        },
        "targets": TARGETS,
    }


def print_table(console: Console, results: dict[str, Any], options: argparse.Namespace) -> None:
    pool = f"the small pool holds {options.pool_tokens:,}"
    table = Table(title=f"prompts of {options.tokens:,} tokens; {pool}")
    for heading in ("", "prefill tok/s", "decode tok/s"):
        table.add_column(heading)
    for name, kinds in results["spread"].items():
        cells = (f"{s['p50']:.1f} [{s['q25']:.1f}, {s['q75']:.1f}]" for s in kinds.values())
        table.add_row(name, *cells)
    shares = results["streamed_over_pool"]
    table.add_row(
        "streamed / pool",
        *(f"{s['ratio']:.2f} [{s['low']:.2f}, {s['high']:.2f}]" for s in shares.values()),
    )
    table.add_row("wanted", *(f">= {TARGETS[kind]:.2f}" for kind in shares))
    console.print(table)


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5))
    for axis, kind in zip(axes, TARGETS, strict=True):
        for name, kinds in results["speeds"].items():
            axis.plot(range(1, len(kinds[kind]) + 1), kinds[kind], "o-", label=name)
        axis.set(title=kind, xlabel="repeat", ylabel="tokens/s", ylim=(0, None))
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    console = open_console()
    choose_model(options)
    results: dict[str, Any] = {
        "machine": machine.describe(),
        "options": shown(options),
    }
    console.print("starting two servers")
    with started({name: partial(start, options, name) for name in (POOL, STREAMED)}) as servers:
        results |= summarise(measure(console, servers, options), options)
    write(console, results, options)
    return 0


def write(console: Console, results: dict[str, Any], options: argparse.Namespace) -> None:
    """The table, the JSON and the figure."""
    print_table(console, results, options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    plot(results, options.out.with_suffix(".png"))
    console.print(f"{options.out}\n{options.out.with_suffix('.png')}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
