"""`make bench-waits`: questions to one new document, all at once, answered by two servers in turn.

One has `--smg-wait-steps 0`, so that each question is computed as it comes. Counted are the prompt
tokens that were found nowhere, beside one document and all questions, which is the least; and the
time to the first token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
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
AT_ONCE, WAITING = "each computed as it comes", "waiting for what is on its way"
DOCUMENT, QUESTION, QUESTIONS, NEW = 2000, 32, 8, 8


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = server_parser("make bench-waits", __doc__, OUT / "waits.json", "")
    parser.add_argument("--repeats", type=int, default=8, help="documents for each server (8)")
    parser.add_argument("--chunk", type=int, default=2048, help="--chunked-prefill-size (2048)")
    return parser.parse_args(arguments)


def start(options: argparse.Namespace, name: str) -> SglangServer:
    args = ["--max-total-tokens", "32768", "--chunked-prefill-size", str(options.chunk)]
    return start_smg(
        options, name, [*args, *(["--smg-wait-steps", "0"] if name == AT_ONCE else [])]
    )


async def ask(server: SglangServer, prompts: list[tuple[int, ...]]) -> list[Answer]:
    async with Client(server.url) as client, asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(client.ask(prompt, NEW)) for prompt in prompts]
    return [task.result() for task in asked]


def measure(
    console: Console, servers: dict[str, SglangServer], options: argparse.Namespace
) -> dict[str, list[list[Answer]]]:
    rng = random.Random(1)
    answers: dict[str, list[list[Answer]]] = {name: [] for name in servers}
    for repeat in range(options.repeats + 1):
        document = words(rng, DOCUMENT)
        prompts = [document + words(rng, QUESTION) for _ in range(QUESTIONS)]
        for name in list(servers) if repeat % 2 else list(servers)[::-1]:
            with console.status(f"document {repeat} of {options.repeats}: {name}"):
                found = asyncio.run(ask(servers[name], prompts))
            if repeat:  # the first warms up
                answers[name].append(found)
    return answers


def summarise(answers: dict[str, list[list[Answer]]]) -> dict[str, Any]:
    least = DOCUMENT + QUESTIONS * QUESTION
    ttft = {
        name: [sum(a.ttft_s for a in each) / len(each) for each in rounds]
        for name, rounds in answers.items()
    }
    computed = {
        name: [
            (QUESTIONS * (DOCUMENT + QUESTION) - sum(sum(a.cached.values()) for a in each)) / least
            for each in rounds
        ]
        for name, rounds in answers.items()
    }
    return {
        "computed_over_least": {name: spread(values) for name, values in computed.items()},
        "ttft_s": {name: spread(values) for name, values in ttft.items()},
        "last_ttft_s": {
            name: spread([max(a.ttft_s for a in each) for each in rounds])
            for name, rounds in answers.items()
        },
        "rounds_s": ttft,
        "waiting_over_at_once": compare(ttft[WAITING], ttft[AT_ONCE]),
    }


def print_table(console: Console, results: dict[str, Any]) -> None:
    table = Table(title=f"{QUESTIONS} questions at once to a new document of {DOCUMENT:,} tokens")
    for heading in ("", "computed, of the least", "TTFT, mean", "TTFT of the last"):
        table.add_column(heading)
    for name, seen in results["ttft_s"].items():
        last = results["last_ttft_s"][name]
        table.add_row(
            name,
            f"{results['computed_over_least'][name]['p50']:.2f}",
            f"{seen['p50']:.2f} s [{seen['q25']:.2f}, {seen['q75']:.2f}]",
            f"{last['p50']:.2f} s",
        )
    ratio = results["waiting_over_at_once"]
    table.add_row("in pairs", "", f"{ratio['ratio']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]")
    console.print(table)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    console = open_console()
    choose_model(options)
    results: dict[str, Any] = {"machine": machine.describe(), "options": shown(options)}
    console.print("starting two servers")
    with started({name: partial(start, options, name) for name in (AT_ONCE, WAITING)}) as servers:
        results |= summarise(measure(console, servers, options))
    print_table(console, results)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    console.print(str(options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
