"""`make bench-storage`: time to first token of a prompt that is nowhere, in storage, in host
memory, on the device; and what the storage backend moves a second, beside plain direct I/O.

One server with `--smg-storage file`. In each round a new document is asked for four times:
computed, found on the device, found in host memory after another document has taken the device,
and, once storage has it and `/flush_cache` has emptied both, found in storage. What storage reads
then is in the page cache of the operating system, unless the machine is short of memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.serving import machine
from bench.serving.client import Answer, Client
from bench.serving.setting import choose_model, open_console, server_parser, shown
from bench.serving.statistics import compare, spread
from bench.serving.subjects import start_smg
from bench.serving.workloads import words
from smg_sglang.doctor.disk import direct_speed
from tools.sglang_server import SglangServer

OUT = Path(__file__).parent / "out"
POOL_TOKENS, DOCUMENT_TOKENS, OTHER_TOKENS = 4608, 2000, 4096
TIERS = ("cold", "storage", "host", "device")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = server_parser("make bench-storage", __doc__, OUT / "storage.json", "")
    add = parser.add_argument
    add("--rounds", type=int, default=6, help="documents (6)")
    add("--directory", type=Path, help="where pages are stored (a temporary directory)")
    return parser.parse_args(arguments)


def start(options: argparse.Namespace, directory: Path) -> SglangServer:
    config = json.dumps({"file_storage_path": str(directory / "pages"), "max_size": "4G"})
    args = ["--max-total-tokens", str(POOL_TOKENS), "--smg-storage", "file"]
    args += ["--smg-storage-config", config, "--smg-storage-wait-ms", "10000"]
    return start_smg(options, "storage", args)


def storage_state(server: SglangServer) -> dict[str, Any]:
    state: dict[str, Any] = server.get("/server_info")["internal_states"][0]["smg"]["storage"]
    return state


def wait_until_written(server: SglangServer) -> None:
    """Until nothing has been written for a second."""
    written, since = -1, time.monotonic()
    while time.monotonic() - since < 1.0:
        now = (storage_state(server)["pages"] or {}).get("written", 0)
        if now != written:
            written, since = now, time.monotonic()
        time.sleep(0.1)


def ask(server: SglangServer, prompt: tuple[int, ...]) -> Answer:
    async def once() -> Answer:
        async with Client(server.url) as client:
            return await client.ask(prompt, 2)

    return asyncio.run(once())


def measure(console: Console, server: SglangServer, rounds: int) -> dict[str, list[float]]:
    """Seconds to the first token, by tier; each answer says that it came from there."""
    rng, seconds = random.Random(1), {tier: list[float]() for tier in TIERS}
    ask(server, words(rng, DOCUMENT_TOKENS))  # the first forward of a server is slow
    for number in range(rounds):
        document = words(rng, DOCUMENT_TOKENS)
        for tier in ("cold", "device", "host", "storage"):
            with console.status(f"round {number + 1} of {rounds}: {tier}"):
                if tier == "host":
                    ask(server, words(rng, OTHER_TOKENS))
                if tier == "storage":
                    wait_until_written(server)
                    server.flush()
                answer = ask(server, document)
            found = max(answer.cached, key=lambda t: answer.cached[t], default="cold")
            if tier != ("cold" if not sum(answer.cached.values()) else found):
                raise RuntimeError(f"asked for {tier}, found {answer.cached}")
            seconds[tier].append(answer.ttft_s)
    return seconds


def backend_speed(server: SglangServer) -> dict[str, float]:
    """Bytes a second of the storage process's own calls."""
    from smg_sglang.storage.client import ask_counters

    address = server.get("/server_info")["internal_states"][0]["smg"]["memory_address"]
    counters = ask_counters(address, 5.0)
    if counters is None:
        return {}
    return {
        "write": counters.written_bytes / max(counters.write_seconds, 1e-9),
        "read": counters.read_bytes / max(counters.read_seconds, 1e-9),
    }


def print_tables(console: Console, results: dict[str, Any]) -> None:
    table = Table(title=f"time to first token of a prompt of {DOCUMENT_TOKENS:,} tokens")
    for heading in ("found", "median [quartiles]", "of cold"):
        table.add_column(heading)
    for tier, seen in results["ttft_s"].items():
        ratio = results["over_cold"].get(tier)
        table.add_row(
            tier,
            f"{seen['p50']:.3f} s [{seen['q25']:.3f}, {seen['q75']:.3f}]",
            f"1/{1 / ratio['ratio']:.1f}" if ratio else "",
        )
    console.print(table)
    for who in ("backend", "plain"):
        speeds = {k: f"{v / 1e9:.2f} GB/s" for k, v in results["bytes_a_second"][who].items()}
        console.print(f"{who}: {speeds}")


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    console = open_console()
    choose_model(options)
    directory = options.directory or Path(tempfile.mkdtemp(prefix="smg-bench-storage-"))
    directory.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine.describe(), "options": shown(options)}
    server = start(options, directory)
    try:
        seconds = measure(console, server.wait_ready(), options.rounds)
        speeds = {"backend": backend_speed(server), "plain": direct_speed(directory)}
    finally:
        server.stop()
        shutil.rmtree(directory / "pages", ignore_errors=True)
        if options.directory is None:
            shutil.rmtree(directory, ignore_errors=True)
    results["ttft_s"] = {tier: spread(values) for tier, values in seconds.items()}
    results["rounds_s"] = seconds
    results["over_cold"] = {t: compare(seconds[t], seconds["cold"]) for t in TIERS[1:]}
    results["bytes_a_second"] = speeds
    print_tables(console, results)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    console.print(str(options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
