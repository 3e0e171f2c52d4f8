"""What the memory server costs: books alone, and whole round trips to a server process.

    python bench/memory.py [--quick] [--out FILE]

Prints a table and writes JSON, by default bench/out/memory.json. Times are microseconds
unless said otherwise.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from smg_sglang.memory.books import Books
from smg_sglang.memory.client import MemoryConnection
from smg_sglang.memory.namespace import Namespace
from smg_sglang.memory.process import MemoryProcess

PAGE_TOKENS = 16
PROMPT_PAGES = 100_000 // PAGE_TOKENS
# Pages of 4 KiB, so that a small arena holds as many pages as a real one of hundreds of GB.
NAMESPACE = Namespace("bench", "bf16", "flat", PAGE_TOKENS, 4096)
CLIENT = b"bench"


def timed(action: Callable[[int], Any], repeats: int) -> dict[str, float]:
    """Median and tail of `action(i)` over `repeats` calls."""
    taken = np.empty(repeats)
    for i in range(repeats):
        began = time.perf_counter()
        action(i)
        taken[i] = time.perf_counter() - began
    p50, p99 = np.percentile(taken * 1e6, [50, 99])
    return {"p50_us": round(float(p50), 1), "p99_us": round(float(p99), 1), "repeats": repeats}


def make_books(pages: int) -> Books:
    """Books of an arena of `pages` pages with one client."""
    books = Books(pages * NAMESPACE.page_bytes, 4 << 20)
    books.connect(CLIENT, NAMESPACE)
    return books


def fill(books: Books, pages: int, path_pages: int = 250, first_id: int = 1 << 40) -> list[bytes]:
    """Publish distinct paths of `path_pages` until `pages` are held."""
    paths = [os.urandom(16 * path_pages) for _ in range(pages // path_pages)]
    for id_, path in enumerate(paths, first_id):
        books.reserve(CLIENT, id_, path)
        books.publish(CLIENT, id_)
    return paths


def bench_match(repeats: int) -> dict[str, Any]:
    """Lookup and release of a 100,000-token prompt among 100,000 pages; no sockets."""
    books = make_books(1 << 17)
    fill(books, 100_000)
    path = os.urandom(16 * PROMPT_PAGES)
    for start in range(0, PROMPT_PAGES, 512):  # as chunked prefill publishes it
        books.reserve(CLIENT, 1, path[: 16 * (start + 512)])
        books.publish(CLIENT, 1)

    def one(i: int) -> None:
        pages = books.lookup(CLIENT, i, path, 0)
        assert len(pages) == PROMPT_PAGES
        books.release(CLIENT, i)

    return {"books: lookup + release, 6,250 pages": timed(one, repeats)}


def bench_evict(repeats: int, sizes: list[int]) -> dict[str, Any]:
    """Reserve, evict and publish 64 pages at a time in a full memory of growing size."""
    rows = {}
    for size in sizes:
        books = make_books(size)
        fill(books, size)
        fresh = [os.urandom(16 * 64) for _ in range(repeats)]

        def one(i: int, books: Books = books, fresh: list[bytes] = fresh) -> None:
            _, pages = books.reserve(CLIENT, i, fresh[i])
            assert len(pages) == 64
            books.publish(CLIENT, i)

        rows[f"books: evict 64 + publish 64, {size:,} pages held"] = timed(one, repeats)
    return rows


def bench_calls(connection: MemoryConnection, repeats: int) -> dict[str, Any]:
    """Round trips to the server process."""
    path = os.urandom(16 * PROMPT_PAGES)
    connection.publish(connection.reserve(path, 10))
    short = path[: 16 * 125]

    def lookup(path: bytes) -> None:
        lease = connection.lookup(path, 0, 10)
        assert lease is not None and len(lease.pages) == len(path) // 16
        connection.release(lease)

    return {
        "call: ping": timed(lambda i: connection.ping(10), repeats),
        "call: lookup, 2,000 tokens": timed(lambda i: lookup(short), repeats),
        "call: lookup, 100,000 tokens": timed(lambda i: lookup(path), repeats),
        "call: lookup, miss of 100,000 tokens": timed(
            lambda i: connection.lookup(i.to_bytes(16, "little") + path[16:], 0, 10), repeats
        ),
    }


def bench_publish(connection: MemoryConnection, repeats: int) -> dict[str, Any]:
    """Reserve + publish of 32 pages (a chunk of 512 tokens), evicting once memory is full."""
    fresh = [os.urandom(16 * 32) for _ in range(repeats)]

    def one(i: int) -> None:
        reservation = connection.reserve(fresh[i], 10)
        assert len(reservation.pages) == 32
        connection.publish(reservation)

    row = timed(one, repeats)
    row["per_s"] = round(1e6 / row["p50_us"])
    return {"call: reserve + publish 32 pages": row}


def print_table(rows: dict[str, dict[str, float]]) -> None:
    """For people."""
    print(f"{'':<52}{'p50 us':>10}{'p99 us':>10}{'repeats':>9}")
    for name, row in rows.items():
        print(f"{name:<52}{row['p50_us']:>10}{row['p99_us']:>10}{row['repeats']:>9}")


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats and sizes")
    default = Path(__file__).parent / "out" / "memory.json"
    parser.add_argument("--out", type=Path, default=default, help="JSON (bench/out/memory.json)")
    options = parser.parse_args()
    quick, out = options.quick, options.out
    repeats = 200 if quick else 2000
    rows = bench_match(repeats)
    sizes = [10_000, 100_000] if quick else [10_000, 100_000, 1_000_000]
    rows |= bench_evict(min(repeats, 1000), sizes)
    server = MemoryProcess.start(256 << 20)
    try:
        connection = MemoryConnection.open(server.address, NAMESPACE, 10)
        rows |= bench_calls(connection, repeats) | bench_publish(connection, repeats)
        connection.close()
    finally:
        server.stop()
    print_table(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "kernel": platform.release()}
    out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    print(f"\n{out}")


if __name__ == "__main__":
    main()
