"""How fast host memory is read by decode attention: the C kernel beside torch and a plain read.

    make bench-host-attention [ARGS="--help"]

One query over pages at random places of a memfd, as in the host tier: GB of keys and values a
second, on one core and on all. The subjects take turns in every round; figures are medians with
quartiles. A call reads more than the last-level cache holds, and layers take turns.
"""

from __future__ import annotations

import os

# As the CPU platform sets it; it counts only before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from smg_sglang.attention import cpu, decode
from smg_sglang.attention.native.build import runnable
from smg_sglang.attention.native.kernel import NativeAttention
from smg_sglang.attention.page_attention import native
from smg_sglang.attention.pages import (
    PageAttention,
    page_memory,
    page_rows,
    page_run,
    plan_pages,
)
from smg_sglang.attention.torch_pages import TorchAttention
from smg_sglang.memory.arena import Arena, create_memfd
from smg_sglang.transfer.layout import DTYPES, PageLayout, Part

#: Reads a layer's keys and values once.
Subject = Callable[[int], object]
READ = "plain read, in order"
READ_PAGES = "plain read, page by page"


@dataclass(frozen=True)
class Shape:
    """query: query heads. Bytes are those of one layer's keys and values."""

    query: int
    kv: int
    dim: int
    page_size: int
    tokens: int
    layers: int
    dtype: torch.dtype

    @property
    def layout(self) -> PageLayout:
        parts = (Part(n, self.kv, self.dim, self.dtype.itemsize) for n in ("k", "v"))
        return PageLayout(tuple(parts), self.layers, self.page_size, DTYPES[self.dtype])

    @property
    def pages(self) -> int:
        return self.tokens // self.page_size

    @property
    def layer_bytes(self) -> int:
        return self.pages * self.layout.layer_bytes


class World:
    """An arena of random keys and values, its pages in random order, and a query."""

    def __init__(self, shape: Shape):
        self.shape, self.layout = shape, shape.layout
        size = shape.pages * self.layout.page_bytes
        fd = create_memfd(size)
        self.arena = Arena(fd, size)
        os.close(fd)
        torch.manual_seed(0)
        self.bytes = self.arena.buffer
        block = torch.randn(1 << 20).to(shape.dtype).view(torch.uint8).numpy()
        for begin in range(0, size, len(block)):
            self.bytes[begin : begin + len(block)] = block[: size - begin]
        order = np.random.default_rng(0).permutation(shape.pages)
        self.offsets = order.astype(np.int64) * self.layout.page_bytes
        self.q_dtype = shape.dtype if shape.dtype.itemsize > 1 else torch.bfloat16
        self.q = torch.randn(1, shape.query, shape.dim).to(self.q_dtype)
        self.out = torch.empty(1, shape.query, shape.dim)
        self.lse = torch.empty(1, shape.query)
        self.scale = shape.dim**-0.5
        self.table = plan_pages(
            [[page_run(0, self.offsets, shape.page_size)]], page_rows(self.layout)
        )

    def attend(self, attention: PageAttention, layer: int) -> torch.Tensor:
        memory = page_memory(self.bytes, self.layout, layer)
        attention.attend_pages(self.q, self.table, [memory], self.out, self.lse, scale=self.scale)
        return self.out

    def gathered(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [tokens, kv_heads, dim] of layer 0, copied together."""
        whole = torch.from_numpy(self.bytes).view(self.shape.dtype)
        parts = whole.view(self.shape.pages, self.shape.layers, 2, -1)[:, 0]
        rows = parts[torch.from_numpy(self.offsets // self.layout.page_bytes)]
        k, v = (rows[:, part].reshape(-1, self.shape.kv, self.shape.dim) for part in (0, 1))
        return k, v


def kernel_subjects(world: World, threads: int) -> tuple[dict[str, Subject], NativeAttention]:
    kernels = {v.name: native(v, threads) for v in runnable()}
    subjects: dict[str, Subject] = {
        f"kernel, {name}": partial(world.attend, kernel) for name, kernel in kernels.items()
    }
    return subjects, next(iter(kernels.values()))


def read_subjects(world: World, reader: NativeAttention) -> dict[str, Subject]:
    """As many bytes as a layer has: one range, and the layer's in the order of its pages."""
    size, begin = world.shape.layer_bytes, world.bytes.ctypes.data
    part = 1 << 20
    parts = np.arange(0, size, part)
    page = world.layout.layer_bytes
    return {
        READ: lambda layer: reader.read(begin + layer * size, parts, min(part, size)),
        READ_PAGES: lambda layer: reader.read(begin + layer * page, world.offsets, page),
    }


def torch_subjects(world: World) -> dict[str, Subject]:
    """What there was before, in memory that is laid out for it."""
    subjects: dict[str, Subject] = {"fall-back, torch": partial(world.attend, TorchAttention())}
    if world.shape.dtype != world.q_dtype:
        return subjects
    k, v = world.gathered()
    attend = partial(cpu.attend, world.q, scale=world.scale, causal=False)
    subjects["torch, as pages are staged"] = lambda _: attend(k, v)
    heads = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v)]
    subjects["torch, head by head"] = lambda _: attend(*heads)
    if decode.supports(world.q, k, v):
        subjects["numba, in place"] = numba_subject(world, k, v)
    return subjects


def numba_subject(world: World, k: torch.Tensor, v: torch.Tensor) -> Subject:
    size = world.shape.page_size
    rows = np.tile(np.arange(size, dtype=np.int32), len(world.offsets))
    plan = decode.plan_pieces([[decode.Piece(1, np.repeat(world.offsets, size), rows)]])

    def run(layer: int) -> torch.Tensor:
        memory = page_memory(world.bytes, world.layout, layer)[:2]
        return decode.attend_slots(world.q, k, v, plan, scale=world.scale, memories=[memory]).out

    return run


def measure(world: World, threads: int, rounds: int) -> dict[str, list[float]]:
    """GB/s of each subject: [first quartile, median, third quartile]."""
    torch.set_num_threads(threads)
    subjects, reader = kernel_subjects(world, threads)
    size = world.shape.layer_bytes
    subjects |= read_subjects(world, reader)
    subjects |= torch_subjects(world)
    check(world, subjects)
    rates = defaultdict(list)
    for turn in range(rounds):
        for name, run in subjects.items():
            start = time.perf_counter()
            run(turn % world.shape.layers)
            rates[name].append(size / (time.perf_counter() - start) / 1e9)
    return {name: statistics.quantiles(values, n=4) for name, values in rates.items()}


def check(world: World, subjects: dict[str, Subject]) -> None:
    """All subjects find the same; also their first call, which may compile."""
    want = world.attend(TorchAttention(), 0).clone()
    for name, run in subjects.items():
        got = run(0)
        if name not in {READ, READ_PAGES}:
            got = got.out if hasattr(got, "out") else got
            torch.testing.assert_close(got.float(), want, atol=1e-2, rtol=1e-2)


def show(console: Console, shape: Shape, results: dict[int, dict[str, list[float]]]) -> None:
    table = Table(
        title=f"{shape.query} query heads, {shape.kv} KV heads of {shape.dim}, "
        f"{str(shape.dtype).removeprefix('torch.')}, {shape.tokens} tokens in pages of "
        f"{shape.page_size} at random places: GB/s of keys and values"
    )
    table.add_column("", no_wrap=True)
    for threads in results:
        cores = "1 core" if threads == 1 else f"{threads} cores"
        table.add_column(cores, justify="right")
        table.add_column("of the read", justify="right")
    for name in next(iter(results.values())):
        cells = []
        for rates in results.values():
            low, median, high = rates[name]
            cells += [f"{median:.1f} ({low:.1f}-{high:.1f})", f"{median / rates[READ][1]:.0%}"]
        table.add_row(name, *cells)
    console.print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--rounds", type=int, default=15)
    add("--heads", type=int, nargs=2, default=(32, 8), help="query and KV heads (32 8)")
    add("--dim", type=int, default=128, help="of a head (128)")
    add("--page-size", type=int, default=16, help="tokens a page (16)")
    add("--tokens", type=int, default=32768, help="of the context; more than the cache holds")
    add("--layers", type=int, default=4, help="that take turns (4)")
    add("--dtype", default="bfloat16", help="of keys and values (bfloat16)")
    add("--threads", type=int, nargs="+", default=[1, len(os.sched_getaffinity(0))])
    add("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args()


def report(shape: Shape, results: dict[int, dict[str, list[float]]]) -> dict:
    """What is written as JSON; rates are [first quartile, median, third quartile] in GB/s."""
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "instruction_set": runnable()[0].name,
        "load": os.getloadavg(),
        "heads": [shape.query, shape.kv],
        "dim": shape.dim,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "page_size": shape.page_size,
        "tokens": shape.tokens,
        "results": [
            {
                "threads": threads,
                "gb_per_s": rates,
                "gb_per_s_a_core": {name: r[1] / threads for name, r in rates.items()},
            }
            for threads, rates in results.items()
        ],
    }


@torch.no_grad()
def main() -> None:
    options = parse()
    shape = Shape(
        *options.heads,
        options.dim,
        options.page_size,
        options.tokens // options.page_size * options.page_size,
        options.layers,
        getattr(torch, options.dtype),
    )
    console = Console()
    world = World(shape)
    results = {n: measure(world, n, options.rounds) for n in dict.fromkeys(options.threads)}
    show(console, shape, results)
    console.print(
        f"instruction set: {runnable()[0].name}; load average {os.getloadavg()[0]:.1f} at the end"
    )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report(shape, results), indent=1) + "\n")
        console.print(f"written to {options.json}")


if __name__ == "__main__":
    main()
