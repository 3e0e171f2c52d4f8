"""`make bench-hints`: agents that call a tool and come back after a pause, on two servers in turn.

In each round agents have a turn, then other prompts, which nobody asks again, pass through the
server: more than its host memory holds. After that pause the agents come back with what their tool
said. On one server they said before what they would do: `retain` with the turn, `demote` with the
last one. Compared is the time to the first token after the pause.
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
WITHOUT, WITH = "nothing said", "retain and demote"
POOL_TOKENS, AGENTS, ANSWER, TOOL = 4096, 2, 16, 48
#: Tokens of a prompt of the traffic between.
BETWEEN = 1000


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = server_parser("make bench-hints", __doc__, OUT / "hints.json", "", host_gb=0.125)
    add = parser.add_argument
    add("--repeats", type=int, default=8, help="rounds for each server (8)")
    add("--context", type=int, default=1200, help="tokens of an agent before the pause (1200)")
    add("--between", type=int, default=9, help=f"prompts of {BETWEEN} tokens in the pause (9)")
    return parser.parse_args(arguments)


def start(options: argparse.Namespace, name: str) -> SglangServer:
    return start_smg(options, name, ["--max-total-tokens", str(POOL_TOKENS)])


def envelope(kind: str, **payload: Any) -> dict[str, Any]:
    """What SGLang calls `kv_hints`: one action."""
    action = {
        "action_id": "1",
        "action_type": kind,
        "action_version": "1",
        "payload": payload,
    }
    return {"protocol_version": "1", "message_id": "bench", "actions": [action]}


async def play(
    server: SglangServer,
    agents: list[tuple[int, ...]],
    between: list[tuple[int, ...]],
    tools: list[tuple[int, ...]],
    *,
    hints: bool,
) -> list[Answer]:
    """One round; the answers after the pause."""
    before = envelope("retain", seconds=600) if hints else None
    last = envelope("demote") if hints else None
    async with Client(server.url) as client:
        first = [await client.ask(agent, ANSWER, hints=before) for agent in agents]
        for prompt in between:
            await client.ask(prompt, 1)
        return [
            await client.ask((*agent, *answer.output_ids, *tool), ANSWER, hints=last)
            for agent, answer, tool in zip(agents, first, tools, strict=True)
        ]


def measure(
    console: Console, servers: dict[str, SglangServer], options: argparse.Namespace
) -> dict[str, list[list[Answer]]]:
    rng = random.Random(1)
    answers: dict[str, list[list[Answer]]] = {name: [] for name in servers}
    for repeat in range(options.repeats + 1):
        agents = [words(rng, options.context) for _ in range(AGENTS)]
        between = [words(rng, BETWEEN) for _ in range(options.between)]
        tools = [words(rng, TOOL) for _ in range(AGENTS)]
        for name in list(servers) if repeat % 2 else list(servers)[::-1]:
            with console.status(f"round {repeat} of {options.repeats}: {name}"):
                found = asyncio.run(play(servers[name], agents, between, tools, hints=name == WITH))
            if repeat:  # the first warms up
                answers[name].append(found)
    return answers


def summarise(answers: dict[str, list[list[Answer]]]) -> dict[str, Any]:
    ttft = {
        name: [[answer.ttft_s for answer in each] for each in rounds]
        for name, rounds in answers.items()
    }
    means = {name: [sum(each) / len(each) for each in rounds] for name, rounds in ttft.items()}
    return {
        "ttft_s": {
            name: spread([one for each in rounds for one in each]) for name, rounds in ttft.items()
        },
        "found_share": {
            name: sum(sum(answer.cached.values()) for each in rounds for answer in each)
            / sum(answer.prompt_tokens for each in rounds for answer in each)
            for name, rounds in answers.items()
        },
        "same_answers": all(
            [one.output_ids for one in ours] == [one.output_ids for one in theirs]
            for ours, theirs in zip(*answers.values(), strict=True)
        ),
        "rounds_s": means,
        "with_over_without": compare(means[WITH], means[WITHOUT]),
    }


def print_table(console: Console, results: dict[str, Any]) -> None:
    table = Table(title="agents that come back after a pause, under memory pressure")
    for heading in ("", "TTFT after the pause, p50", "of the prompt found"):
        table.add_column(heading)
    for name, seen in results["ttft_s"].items():
        table.add_row(
            name,
            f"{seen['p50']:.2f} s [{seen['q25']:.2f}, {seen['q75']:.2f}]",
            f"{results['found_share'][name]:.0%}",
        )
    ratio = results["with_over_without"]
    table.add_row("in pairs", f"{ratio['ratio']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]")
    console.print(table)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    console = open_console()
    choose_model(options)
    results: dict[str, Any] = {"machine": machine.describe(), "options": shown(options)}
    console.print("starting two servers")
    with started({name: partial(start, options, name) for name in (WITHOUT, WITH)}) as servers:
        results |= summarise(measure(console, servers, options))
    print_table(console, results)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    console.print(str(options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
