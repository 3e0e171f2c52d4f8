"""The figures that docs/measured.md shows, from each benchmark's own JSON."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

from bench.serving.subjects import SMG, STOCK
from bench.suite.figures import Figure, figure_from

Json = dict[str, Any]


def serving(result: Json) -> Iterator[Figure]:
    """`make bench`: prefix, chats, documents, no reuse."""
    phases = result["phases"]
    if "prefix" in phases:
        yield from _prefix(phases["prefix"])
    for name in ("chats", "documents"):
        if name in phases:
            yield from _reuse(phases[name])
    if "no_reuse" in phases:
        yield from _no_reuse(phases["no_reuse"])


def _prefix(phase: Json) -> Iterator[Figure]:
    stock, ours = phase["subjects"][STOCK], phase["subjects"][SMG]
    for tier, what in (("cold", "cold"), ("device", "on the device"), ("host", "in host memory")):
        a, b = (row.get(tier) or {} for row in (stock, ours))
        if b:
            title = "a 2,000-token prefix"
            yield Figure(title, f"TTFT p50, {what}", "s", a.get("p50"), b["p50"])


def _reuse(phase: Json) -> Iterator[Figure]:
    stock, ours = phase["subjects"][STOCK], phase["subjects"][SMG]

    def both(what: str, unit: str, get: Callable[[Json], float]) -> Figure:
        return Figure(phase["title"], what, unit, get(stock), get(ours))

    yield both("TTFT mean", "s", lambda row: row["ttft_s"]["mean"])
    yield both("TTFT p50", "s", lambda row: row["ttft_s"]["p50"])
    yield both("TTFT p99", "s", lambda row: row["ttft_s"]["p99"])
    yield both("prompt + output tokens a second", "tok/s", lambda row: row["tokens_per_s"])
    yield both("hits on the device", "share", lambda row: row["hit_share"].get("device", 0))
    yield both("hits in host memory", "share", lambda row: row["hit_share"].get("host", 0))
    yield both("hits, of an infinite cache's", "share", lambda row: row["of_infinite"])


def _no_reuse(phase: Json) -> Iterator[Figure]:
    stock, ours = phase["subjects"][STOCK], phase["subjects"][SMG]
    names = {"tokens_per_s": ("throughput", "tok/s"), "itl_s": ("inter-token latency", "ms")}
    for name, (what, unit) in names.items():
        scale = 1e3 if unit == "ms" else 1
        a, b = (row[name]["p50"] * scale for row in (stock, ours))
        yield Figure("prompts that share nothing", what, unit, a, b)
        ratio = phase["ratios"][SMG][name]["ratio"]
        yield Figure("prompts that share nothing", f"{what}, ours / stock in pairs", "x", 1, ratio)


def programs(result: Json) -> Iterator[Figure]:
    """`make bench-programs`."""
    for name, program in result["programs"].items():
        title = f"frontend program: {name.replace('_', ' ')} ({result['options']['dtype']})"
        stock, ours = program["subjects"][STOCK], program["subjects"][SMG]
        yield Figure(title, "time", "s", stock["seconds"]["p50"], ours["seconds"]["p50"])
        yield Figure(
            title, "hits on the device", "share", stock["device"]["p50"], ours["device"]["p50"]
        )
        yield Figure(
            title, "hits in host memory", "share", stock["host"]["p50"], ours["host"]["p50"]
        )
        a, b = program["stock_against_itself"], program["ours_against_stock"]
        yield Figure(title, "outputs unlike stock's first run", "n", a["different"], b["different"])


def attention(result: Json) -> Iterator[Figure]:
    """`bench/attention.py`: new tokens on a cached prefix."""
    for row in result["results"]:
        if row["kind"] == "cached prefix" and row["batch"] == 1:
            title = f"attention, {row['layers']} layers, {row['dtype']} (baseline: torch_native)"
            what = f"{row['new']} new tokens on {row['cached']:,}"
            yield Figure(title, what, "ms", row["ms"]["torch_native"][1], row["ms"]["smg"][1])


def tree(result: Json) -> Iterator[Figure]:
    """`bench/tree.py`: pages of 16 tokens, beside SGLang's Rust core."""
    found = {(r["size"], r["operation"], r["subject"]): r["median_us"] for r in result["prompts"]}
    title = f"prefix tree of {result['options']['pages']:,} pages (baseline: SGLang's Rust core)"
    for operation in ("match, 6,000 known", "insert 4,000 new", "match 100,000", "evict 4,000"):
        ours = found.get((16, operation, "RadixTree"))
        rust = found.get((16, operation, "SGLang Rust core"))
        if ours is not None:
            yield Figure(title, f"{operation} tokens", "us", rust, ours)


def memory(result: Json) -> Iterator[Figure]:
    """`bench/memory.py`: round trips to the memory server."""
    for name, row in result["rows"].items():
        if name.startswith("call: "):
            yield Figure("memory server", name.removeprefix("call: "), "us", None, row["p50_us"])


def transfer(result: Json) -> Iterator[Figure]:
    """`bench/transfer.py`: pages at random places, beside a plain copy."""
    for row in result["results"]:
        rates = {name: statistics.median(values) for name, values in row["gb_per_s"].items()}
        plain = max(rate for name, rate in rates.items() if name.startswith("plain"))
        if row["order"] == "random":
            for what in ("spill, compiled", "load, compiled", "spill, kernel", "load, kernel"):
                if what in rates:
                    title = f"pages of {row['shape']} (baseline: a plain copy)"
                    yield Figure(title, what.split(",")[0], "GB/s", plain, rates[what])


def split(result: Json) -> Iterator[Figure]:
    """`bench/split.py`."""
    title = "chats stream while long prompts arrive (baseline: one worker with --enable-smg)"
    one, ours = result["figures"]["one worker"], result["figures"]["split"]
    for what, key in (
        ("ITL p50", "itl_p50_ms"),
        ("ITL p99", "itl_p99_ms"),
        ("ITL max", "itl_max_ms"),
    ):
        yield Figure(title, what, "ms", one[key], ours[key])
    yield Figure(title, "TTFT p50 of the long prompts", "s", one["ttft_p50_s"], ours["ttft_p50_s"])
    title = "hand-off to a decode worker (baseline: the same prompt on its device)"
    for row in result.get("hand_offs", ()):
        if (took := row["handed_off_ms"]) is not None:
            what = f"{row['prompt_tokens']:,} tokens, to the first token"
            yield Figure(title, what, "ms", row["again_on_device_ms"], took)


def context(result: Json) -> Iterator[Figure]:
    """`bench/context.py`."""
    tokens, share = result["options"]["tokens"], result["options"]["share"]
    title = f"prompts of {tokens:,} tokens, streamed (baseline: a pool that holds them)"
    pool, streamed = result["spread"]["all in the pool"], result["spread"]["streamed"]
    for kind in ("prefill", "decode"):
        what = f"{kind}, device pool of 1/{share}"
        yield Figure(title, what, "tok/s", pool[kind]["p50"], streamed[kind]["p50"])
        ratio = result["streamed_over_pool"][kind]["ratio"]
        yield Figure(title, f"{kind}, ours / baseline in pairs", "x", 1, ratio)


def own_figures(result: Json) -> Iterator[Figure]:
    """A benchmark that writes its `figures` as a record holds them."""
    for row in result["figures"]:
        yield figure_from(row)
