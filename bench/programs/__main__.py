"""`make bench-programs`: SGLang frontend programs on stock SGLang and ours; the same outputs?

Greedy, and in fp32 by default: which requests share a batch changes the last bits of a sum, so in
bf16 two runs of one server differ after some tokens, too. "stock again" counts just that.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from bench.programs import chat, few_shot, judge, tree_of_thought
from bench.programs.measure import Program, Result, take_turns, warm_up
from bench.programs.report import print_result
from bench.programs.texts import source
from bench.serving import machine
from bench.serving.setting import choose_model, open_console, shown
from bench.serving.subjects import SMG, STOCK, attention_backend, running
from tools.sglang_server import ServerDied

OUT = Path(__file__).parents[1] / "out"
NAMES = ("few_shot", "tree_of_thought", "chat", "judge")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-programs", description=__doc__)
    add = parser.add_argument
    add("--model-path", help="a model folder or hub name (default: the demo model)")
    add("--only", nargs="+", choices=NAMES, default=NAMES, help="default: all")
    add("--quick", action="store_true", help="one repeat: no spread")
    add("--size", type=int, help="how much each program does (1)")
    add("--repeats", type=int, help="runs of each on each server (3; quick: 1)")
    add("--questions", type=Path, help="MT-bench's question.jsonl (github.com/lm-sys/FastChat)")
    add("--pool-tokens", type=int, default=1536, help="tokens of the device pool (1536)")
    add("--host-gb", type=float, default=2.0, help="GiB of host memory for pages (2)")
    add("--dtype", default="float32", help="of weights and KV (float32, so that texts are equal)")
    add("--attention-backend", help="on both servers (default: smg on a CPU)")
    add("--server-args", default="", help="more flags for both servers, as one string")
    add("--json", type=Path, default=OUT / "programs.json")
    options = parser.parse_args(arguments)
    options.attention_backend = attention_backend(options.attention_backend)
    options.size = options.size or 1
    options.repeats = options.repeats or (1 if options.quick else 3)
    return options


def programs(options: argparse.Namespace) -> dict[str, Program]:
    """Those of `--only`, by title: the name, and what else decides their figures."""
    known: dict[str, Program] = {
        "few_shot": few_shot.run,
        "tree_of_thought": tree_of_thought.run,
        "chat": partial(chat.run, path=options.questions),
        "judge": judge.run,
    }
    titles = {"chat": f"chat, {source(options.questions)}"}
    return {titles.get(name, name): known[name] for name in options.only}


def measure(console: Console, options: argparse.Namespace) -> Result:
    """Each program in turn, its table when it is done."""
    results: Result = {}
    logs = options.json.parent / "logs"
    with ExitStack() as stack:
        with console.status("starting 2 servers; this takes about a minute"):
            servers = stack.enter_context(running([STOCK, SMG], options, logs))
            warm_up(servers)
        for name, program in programs(options).items():
            with Progress(console=console) as bar:
                task = bar.add_task(name, total=2 * options.repeats)
                advance = partial(bar.advance, task)
                results[name] = take_turns(program, servers, options.size, options.repeats, advance)
            print_result(console, name, results[name])
    return results


def main(arguments: list[str]) -> int:
    """0 where all outputs of ours are stock's, or stock differs from itself as well."""
    options = parse(arguments)
    console = open_console()
    choose_model(options)
    began = time.monotonic()
    described = machine.describe()
    programs = measure(console, options)
    results = {
        "machine": described,
        "options": shown(options),
        "programs": programs,
        "seconds": time.monotonic() - began,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"{options.json}\n{results['seconds'] / 60:.1f} minutes")
    return 1 if any(_wrong(result) for result in programs.values()) else 0


def _wrong(result: Result) -> bool:
    ours, stock = result["ours_against_stock"], result["stock_against_itself"]
    return bool(ours["different"]) and not stock["different"]


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ServerDied as error:
        sys.exit(f"A server did not start: {error}")
