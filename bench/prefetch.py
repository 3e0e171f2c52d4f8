"""`make bench-prefetch`: questions to documents in host memory, which wait behind a long prompt.

Two servers take turns, one with `--smg-prefetch`. In each round a new prompt is computed in chunks,
and questions arrive behind it, whose documents have left the device since the round before last.
Without the flag they are loaded in front of the forward that needs them. `--delay-ms` makes a slow
link of a fast one: each copy of a layer begins up to so much later.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
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
AT_ADMISSION, AHEAD = "loaded at admission", "loaded while waiting"
POOL_TOKENS, DOCUMENTS, DOCUMENT_TOKENS, SETS = 16384, 4, 1008, 5
LONG_TOKENS, CHUNK = 2048, 512


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = server_parser("make bench-prefetch", __doc__, OUT / "prefetch.json", "")
    add = parser.add_argument
    add("--repeats", type=int, default=8, help="rounds for each server (8)")
    add("--delay-ms", type=float, default=0.0, help="delay of each layer's copy, at most (0)")
    return parser.parse_args(arguments)


def start(options: argparse.Namespace, name: str) -> SglangServer:
    args = ["--max-total-tokens", str(POOL_TOKENS), "--chunked-prefill-size", str(CHUNK)]
    return start_smg(options, name, [*args, *(["--smg-prefetch"] if name == AHEAD else [])])


async def learn(server: SglangServer, documents: list[tuple[int, ...]]) -> None:
    async with Client(server.url) as client:
        for document in documents:
            await client.ask(document, 1)


async def ask_behind(
    server: SglangServer, long: tuple[int, ...], prompts: list[tuple[int, ...]]
) -> list[Answer]:
    """The answers to `prompts`, which are sent when `long` is being computed."""
    async with Client(server.url) as client, asyncio.TaskGroup() as tasks:
        tasks.create_task(client.ask(long, 1))
        await asyncio.sleep(0.3)
        asked = [tasks.create_task(client.ask(prompt, 1)) for prompt in prompts]
    return [task.result() for task in asked]


def measure(
    console: Console, servers: dict[str, SglangServer], options: argparse.Namespace
) -> dict[str, list[list[Answer]]]:
    rng = random.Random(1)
    sets = [[words(rng, DOCUMENT_TOKENS) for _ in range(DOCUMENTS)] for _ in range(SETS)]
    for name, server in servers.items():
        with console.status(f"documents to {name}"):
            asyncio.run(learn(server, [document for each in sets for document in each]))
    answers: dict[str, list[list[Answer]]] = {name: [] for name in servers}
    for repeat in range(options.repeats):
        long = words(rng, LONG_TOKENS)
        prompts = [document + words(rng, 15) for document in sets[repeat % SETS]]
        order = list(servers) if repeat % 2 else list(servers)[::-1]
        for name in order:
            with console.status(f"round {repeat + 1} of {options.repeats}: {name}"):
                answers[name].append(asyncio.run(ask_behind(servers[name], long, prompts)))
    return answers


def summarise(answers: dict[str, list[list[Answer]]]) -> dict[str, Any]:
    means = {
        name: [sum(answer.ttft_s for answer in each) / len(each) for each in rounds]
        for name, rounds in answers.items()
    }
    return {
        "ttft_s": {name: spread(values) for name, values in means.items()},
        "rounds_s": means,
        "found": {
            name: {
                tier: sum(answer.cached.get(tier, 0) for each in rounds for answer in each)
                for tier in ("device", "host")
            }
            for name, rounds in answers.items()
        },
        "ahead_over_admission": compare(means[AHEAD], means[AT_ADMISSION]),
    }


def print_table(console: Console, results: dict[str, Any], options: argparse.Namespace) -> None:
    delay = f", copies delayed by up to {options.delay_ms:g} ms a layer" if options.delay_ms else ""
    table = Table(title=f"questions behind a prompt of {LONG_TOKENS:,} tokens{delay}")
    for heading in ("", "TTFT of a question, mean", "found on the device", "in host memory"):
        table.add_column(heading)
    for name, seen in results["ttft_s"].items():
        found = results["found"][name]
        table.add_row(
            name,
            f"{seen['p50']:.2f} s [{seen['q25']:.2f}, {seen['q75']:.2f}]",
            f"{found['device']:,} tokens",
            f"{found['host']:,} tokens",
        )
    ratio = results["ahead_over_admission"]
    table.add_row("in pairs", f"{ratio['ratio']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]")
    console.print(table)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    console = open_console()
    choose_model(options)
    os.environ["SMG_TEST_COPY_DELAY_MS"] = str(options.delay_ms)
    results: dict[str, Any] = {"machine": machine.describe(), "options": shown(options)}
    console.print("starting two servers")
    with started(
        {name: partial(start, options, name) for name in (AT_ADMISSION, AHEAD)}
    ) as servers:
        results |= summarise(measure(console, servers, options))
    print_table(console, results, options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    console.print(str(options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
