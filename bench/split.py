"""`make bench-split`: chats stream while long prompts keep arriving; one worker against a split.

Both servers have the same cores and take turns, so that what else the box does meets both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.serving import machine
from bench.serving.client import Answer, Client
from bench.serving.setting import choose_model, open_console, server_parser, shown
from bench.serving.subjects import start_smg, started
from bench.serving.workloads import words
from tools.sglang_server import SglangServer

OUT = Path(__file__).parent / "out"
UNSPLIT, MIXED, SPLIT = "one worker", "one worker, mixed chunks", "split"
#: What SGLang offers against stalls without a split: small chunks, in one batch with the decodes.
MIXED_ARGS = ("--enable-mixed-chunk", "--chunked-prefill-size", "256")
CHAT_PROMPT = 64


@dataclass(frozen=True)
class Turn:
    """One server's turn. Times in seconds from its start."""

    chats: list[Answer]
    longs: list[Answer]

    def gaps(self) -> list[tuple[float, float]]:
        """(when, how long) of each wait for a next token while long prompts were in play."""
        first = min(long.sent_s for long in self.longs)
        last = max(long.token_s[0] for long in self.longs)
        return [
            (later, later - earlier)
            for chat in self.chats
            for earlier, later in zip(chat.token_s, chat.token_s[1:], strict=False)
            if later >= first and earlier <= last
        ]

    def ttfts(self) -> list[float]:
        return [long.ttft_s for long in self.longs]


def parse(arguments: list[str]) -> argparse.Namespace:
    out, told = OUT / "split.json", "; the PNG lies beside"
    parser = server_parser("make bench-split", __doc__, out, told)
    add = parser.add_argument
    add("--streams", type=int, default=8, help="chats that stream (8)")
    add("--long-tokens", type=int, default=4000, help="tokens of a long prompt (4000)")
    add("--longs", type=int, default=3, help="long prompts a turn, one after the other (3)")
    add("--pause-s", type=float, default=2.0, help="seconds between them (2)")
    add("--turns", type=int, default=2, help="turns of each server (2)")
    add("--pool-tokens", type=int, default=16384, help="tokens of each worker's pool (16384)")
    add("--prefill-workers", type=int, default=1)
    add("--decode-workers", type=int, default=1)
    add("--hand-offs", type=int, default=5, help="hand-offs measured of each length (5)")
    options = parser.parse_args(arguments)
    return options


def start(options: argparse.Namespace, name: str) -> SglangServer:
    """A server; only the split differs."""
    args = ["--max-total-tokens", str(options.pool_tokens), "--enable-metrics"]
    if name == MIXED:
        args += MIXED_ARGS
    if name == SPLIT:
        args += ["--smg-prefill-workers", str(options.prefill_workers)]
        args += ["--smg-decode-workers", str(options.decode_workers)]
    return start_smg(options, f"split-{name}", args)


async def take_turn(server: SglangServer, options: argparse.Namespace, seed: int) -> Turn:
    """Chats stream until the last long prompt has its first token and a little longer."""
    rng = random.Random(seed)
    stopped = asyncio.Event()
    chats: list[Answer] = []

    async def chat(client: Client, number: int) -> None:
        while not stopped.is_set():
            chats.append(await client.ask(words(rng, CHAT_PROMPT), 150, number))

    async with Client(server.url) as client:
        tasks = [asyncio.create_task(chat(client, number)) for number in range(options.streams)]
        await asyncio.sleep(options.pause_s)
        longs = []
        for _ in range(options.longs):
            longs.append(await client.ask(words(rng, options.long_tokens), 2))
            await asyncio.sleep(options.pause_s)
        stopped.set()
        await asyncio.gather(*tasks)
    return Turn(chats, longs)


def figures(turns: list[Turn]) -> dict[str, Any]:
    gaps = np.array([gap for turn in turns for _, gap in turn.gaps()]) * 1000
    ttfts = np.array([ttft for turn in turns for ttft in turn.ttfts()])
    return {
        "itl_p50_ms": float(np.percentile(gaps, 50)),
        "itl_p99_ms": float(np.percentile(gaps, 99)),
        "itl_max_ms": float(gaps.max()),
        "tokens": len(gaps),
        "ttft_p50_s": float(np.median(ttfts)),
        "ttft_max_s": float(ttfts.max()),
        "long_prompts": len(ttfts),
    }


def phase_seconds(server: SglangServer) -> dict[str, float]:
    """Mean seconds of each phase, as the phase controller measured them since its start."""
    sums = phase_sums(server)
    return {stage: round(sums["sum"][stage] / n, 3) for stage, n in sums["count"].items() if n}


def phase_sums(server: SglangServer) -> dict[str, dict[str, float]]:
    """Total seconds and number of requests by phase."""
    sums: dict[str, dict[str, float]] = {"sum": {}, "count": {}}
    for line in server.get("/metrics").splitlines():
        for kind, found in sums.items():
            if line.startswith(f"smg:phase_seconds_{kind}{{"):
                found[line.split('stage="')[1].split('"')[0]] = float(line.rsplit(" ", 1)[1])
    return sums


def measure_hand_offs(server: SglangServer, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What a hand-off costs an idle server: from the published prompt to the first token, beside
    the same prompt again, which its decode worker has on the device and computes a page of."""
    rng = random.Random(77)
    # Longer ones may not fit the pool, which is chosen for the long prompts.
    lengths = {length for length in (129, 512, 2048) if length < options.long_tokens}
    lengths.add(options.long_tokens)
    return [_hand_off(server, length, options, rng) for length in sorted(lengths)]


def _hand_off(
    server: SglangServer, length: int, options: argparse.Namespace, rng: random.Random
) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"first_decode": [], "direct": []}
    loaded = _loaded(server)
    for _ in range(options.hand_offs):
        ids = words(rng, length)
        for stage, values in seconds.items():
            before = phase_sums(server)
            server.generate(ids, 2)
            after = phase_sums(server)
            took = after["sum"].get(stage, 0.0) - before["sum"].get(stage, 0.0)
            if after["count"].get(stage, 0) > before["count"].get(stage, 0):
                values.append(took)
    found = {stage: statistics.median(values) * 1000 for stage, values in seconds.items() if values}
    return {
        "prompt_tokens": length,
        "handed_off_ms": found.get("first_decode"),
        "again_on_device_ms": found.get("direct"),
        "loaded_bytes": [b - a for a, b in zip(loaded, _loaded(server), strict=True)],
        "repeats": options.hand_offs,
    }


def _loaded(server: SglangServer) -> list[float]:
    """Bytes and seconds that workers have loaded from host memory."""
    totals = [0.0, 0.0]
    for line in server.get("/metrics").splitlines():
        for place, name in enumerate(("smg:loaded_bytes_total{", "smg:load_seconds_total{")):
            if line.startswith(name):
                totals[place] += float(line.rsplit(" ", 1)[1])
    return totals


def show_hand_offs(console: Console, found: list[dict[str, Any]]) -> None:
    table = Table(title="a hand-off on an idle server: published prompt to first token, medians")
    for head in ("prompt tokens", "handed off", "same prompt on the device", "load of its pages"):
        table.add_column(head, justify="right")
    for f in found:
        load_ms = f["loaded_bytes"][1] / f["repeats"] * 1000
        cells = [f["handed_off_ms"], f["again_on_device_ms"], load_ms]
        table.add_row(
            f"{f['prompt_tokens']:,}", *("-" if c is None else f"{c:.0f} ms" for c in cells)
        )
    console.print(table)


def verdicts(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The promises: p99 of inter-token latency at most 1/5, time to first token at most 2.5x."""
    one, split = found[UNSPLIT], found[SPLIT]
    return {
        "itl_p99_ratio": split["itl_p99_ms"] / one["itl_p99_ms"],
        "itl_p99_at_most": 0.2,
        "ttft_ratio": split["ttft_p50_s"] / one["ttft_p50_s"],
        "ttft_at_most": 2.5,
    }


def show(console: Console, found: dict[str, dict[str, Any]], judged: dict[str, Any]) -> None:
    table = Table(title="chats that stream while long prompts arrive")
    for head in ("", "ITL p50", "ITL p99", "ITL max", "long TTFT p50", "max"):
        table.add_column(head, justify="right")
    for name, f in found.items():
        times = [f"{f[key]:.0f} ms" for key in ("itl_p50_ms", "itl_p99_ms", "itl_max_ms")]
        table.add_row(name, *times, f"{f['ttft_p50_s']:.2f} s", f"{f['ttft_max_s']:.2f} s")
    console.print(table)
    for what in ("itl_p99", "ttft"):
        ratio, limit = judged[f"{what}_ratio"], judged[f"{what}_at_most"]
        word = "kept" if ratio <= limit else "MISSED"
        console.print(f"{what} split / one worker: {ratio:.2f} (at most {limit}): {word}")


def plot(turns: dict[str, list[Turn]], path: Path) -> None:
    """Each wait for a token over time, for the first turn of each; long prompts shaded."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(turns), 1, figsize=(9, 7), sharey=True, squeeze=False)
    for axis, (name, taken) in zip(axes[:, 0], turns.items(), strict=True):
        turn = taken[0]
        for long in turn.longs:
            axis.axvspan(long.sent_s, long.token_s[0], color="tab:orange", alpha=0.2, lw=0)
        when, gaps = zip(*turn.gaps(), strict=True)
        axis.plot(when, np.array(gaps) * 1000, ".", markersize=3)
        axis.set_yscale("log")
        axis.set_ylabel("ms to next token")
        axis.set_title(f"{name} (shaded: a long prompt waits for its first token)", fontsize=9)
    axes[-1, 0].set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    console = open_console()
    choose_model(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    described = machine.describe()
    turns: dict[str, list[Turn]] = {UNSPLIT: [], MIXED: [], SPLIT: []}
    console.print("starting the servers")
    with started({name: partial(start, options, name) for name in turns}) as servers:
        for server in servers.values():
            asyncio.run(take_turn(server, _warm(options), seed=999))
        for number in range(options.turns):
            for name, server in servers.items():
                with console.status(f"turn {number + 1} of {options.turns}: {name}"):
                    turns[name].append(asyncio.run(take_turn(server, options, seed=number)))
        phases = phase_seconds(servers[SPLIT])
        with console.status("hand-offs"):
            hand_offs = measure_hand_offs(servers[SPLIT], options)
    found = {name: figures(taken) for name, taken in turns.items()}
    judged = verdicts(found)
    show(console, found, judged)
    show_hand_offs(console, hand_offs)
    console.print(f"in the split server, seconds a request: {phases}")
    raw = {name: [asdict(turn) for turn in taken] for name, taken in turns.items()}
    result = {
        "machine": described,
        "options": shown(options),
        "figures": found,
        "verdicts": judged,
        "phase_seconds": phases,
        "hand_offs": hand_offs,
        "turns": raw,
    }
    options.out.write_text(json.dumps(result) + "\n")
    plot(turns, options.out.with_suffix(".png"))
    console.print(f"{options.out}\n{options.out.with_suffix('.png')}")
    return 0


def _warm(options: argparse.Namespace) -> argparse.Namespace:
    """One short turn, so that nothing is compiled or allocated in a measured one."""
    return argparse.Namespace(**{**vars(options), "longs": 1, "streams": 2, "pause_s": 0.5})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
