"""How fast pages move: spill and load beside a plain copy of the same bytes.

    python bench/transfer.py [--device cpu|cuda] [--help]

In one process, the subjects take turns in every round; figures are medians with quartiles.
Pages lie in a memfd as the memory server makes it, their slots in a pool of twice as many pages.
``random``: pages at random places on both sides (a cache in use); ``in order``: as when new.
On CUDA also what a spill and a load of a few pages cost the CPU, and how often it enqueues;
`--candidates`: other ways to copy (`copy_candidates.py`) beside the mover's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file

from bench.copy_candidates import candidates
from smg_sglang.memory.arena import Arena, create_memfd
from smg_sglang.transfer.compiling import copy_kernels
from smg_sglang.transfer.copy_rates import measure_copies
from smg_sglang.transfer.cpu import CpuMover
from smg_sglang.transfer.cuda import CudaMover
from smg_sglang.transfer.layout import DevicePool
from smg_sglang.transfer.mover import Mover
from smg_sglang.transfer.pinning import ArenaPins

Subjects = dict[str, Callable[[], None]]


@dataclass(frozen=True)
class Shape:
    """A model's KV as one rank sees it, in bf16. parts: 2 for keys and values, 1 for a latent."""

    layers: int
    heads: int
    dim: int
    parts: int = 2


SHAPES = {
    "SmolLM2-135M": Shape(30, 3, 64),
    "Llama-3.1-8B": Shape(32, 8, 128),
    "Llama-3.1-8B tp8": Shape(32, 1, 128),
    "Qwen2.5-7B": Shape(28, 4, 128),
    "DeepSeek-V2-Lite": Shape(27, 1, 576, parts=1),
}
#: What the targets are about, on CUDA.
CUDA_SHAPES = ["Llama-3.1-8B", "Qwen2.5-7B", "DeepSeek-V2-Lite"]
RESULTS = Path(__file__).parent / "results"


class World:
    """A pool, an arena and the pages to move between them."""

    def __init__(self, shape: Shape, page_size: int, megabytes: int, device: str, order: str):
        self.pool = make_pool(shape, page_size, megabytes, device)
        self.pages = self.pool.num_slots // page_size // 2
        self.nbytes = self.pages * self.pool.layout.page_bytes
        fd = create_memfd(self.nbytes)
        self.arena = Arena(fd, self.nbytes)
        os.close(fd)
        self.pins = ArenaPins()  # memory is page-locked once, whatever copies it
        self.arena.buffer.fill(1)  # touched, or the first round would pay for page faults
        rng = np.random.default_rng(0)
        pick = rng.permutation if order == "random" else np.arange
        pages = pick(2 * self.pages)[: self.pages].astype(np.int64)
        slots = (pages[:, None] * page_size + np.arange(page_size)).reshape(-1)
        self.slots = torch.from_numpy(slots).to(device)
        self.offsets = pick(self.pages).astype(np.int64) * self.pool.layout.page_bytes


def make_pool(shape: Shape, page_size: int, megabytes: int, device: str) -> DevicePool:
    page_bytes = shape.layers * shape.parts * page_size * shape.heads * shape.dim * 2
    slots = 2 * max(1, (megabytes << 20) // page_bytes) * page_size

    def tensor() -> torch.Tensor:
        size = (slots, shape.heads, shape.dim)
        return torch.ones(size, dtype=torch.bfloat16, device=device)

    keys = [tensor() for _ in range(shape.layers)]
    if shape.parts == 1:
        return DevicePool.mla(keys, page_size)
    return DevicePool.mha(keys, [tensor() for _ in range(shape.layers)], page_size)


def movement(world: World, mover: Mover, label: str, pages: int | None = None) -> Subjects:
    """``pages``: so many of the world's; all by default."""
    slots = None if pages is None else pages * mover.layout.page_size
    move = mover.prepare(world.slots[:slots], world.arena.buffer, world.offsets[:pages])

    def load() -> None:
        with mover.loading([move], mover.fence()) as moves:
            for layers in mover.load_groups(moves):
                mover.load_layers(layers, moves[0])
                mark = mover.mark()
            mark.synchronize()

    return {f"spill, {label}": lambda: mover.spill(move), f"load, {label}": load}


def cpu_subjects(world: World) -> Subjects:
    copy = np.ones(world.nbytes, dtype=np.uint8)
    if not copy_kernels.wait():
        raise SystemExit("numba could not compile the copy kernels")
    return {
        "plain memcpy": lambda: np.copyto(copy, world.arena.buffer),
        **movement(world, CpuMover(world.pool), "compiled"),
        **movement(world, CpuMover(world.pool, compiled=False), "torch"),
    }


def cuda_subjects(world: World, with_candidates: bool) -> Subjects:
    device = torch.ones(world.nbytes, dtype=torch.uint8, device="cuda")
    host = torch.ones(world.nbytes, dtype=torch.uint8, pin_memory=True)

    def plain(target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()

    subjects: Subjects = {
        "plain device to host": lambda: plain(host, device),
        "plain host to device": lambda: plain(device, host),
    }
    subjects |= movement(world, cuda_mover(world), "kernel")
    if with_candidates:
        for name, make in candidates(world.pool, world.pins).items():
            subjects |= movement(world, make(), name)
    return subjects


class CountedMover(CudaMover):
    """Counts launches."""

    enqueued = 0

    def _launch(self, *args: Any, **more: Any) -> None:
        self.enqueued += 1
        super()._launch(*args, **more)


def cuda_mover(world: World) -> CountedMover:
    world.pins.pin(world.arena.buffer, world.pool.device)
    if not world.pins.wait(world.arena.buffer):
        raise SystemExit("the driver does not page-lock the arena (see `ulimit -l`)")
    return CountedMover(world.pool, shared_pins=world.pins)


def enqueueing(world: World, pages: int, rounds: int) -> dict[str, dict[str, float]]:
    """What a spill and a load cost this thread: microseconds of CPU time (it sleeps while it waits
    for the copy), the median, and how often it enqueued; wall time beside it."""
    costs, mover = {}, cuda_mover(world)
    for name, run in movement(world, mover, "kernel", pages).items():
        run()  # warms up
        mover.enqueued = 0
        samples = []
        for _ in range(rounds):
            began = time.thread_time(), time.perf_counter()
            run()
            samples.append((time.thread_time() - began[0], time.perf_counter() - began[1]))
        cpu, wall = 1e6 * np.median(samples, axis=0)
        costs[f"{name}, {pages} pages"] = {
            "enqueued": mover.enqueued / rounds, "cpu_us": float(cpu), "us": float(wall)
        }  # fmt: skip
    return costs


def show_enqueueing(console: Console, costs: dict[str, dict[str, float]]) -> None:
    table = Table("what", "launches", "CPU us", "us until copied")
    for name, cost in costs.items():
        table.add_row(name, *(f"{cost[key]:.0f}" for key in ("enqueued", "cpu_us", "us")))
    console.print(table)


def measure(subjects: Subjects, nbytes: int, rounds: int) -> dict[str, list[float]]:
    """GB/s of each subject in each round; the first round warms up."""
    rates: dict[str, list[float]] = defaultdict(list)
    for round_number in range(rounds + 1):
        for name, run in subjects.items():
            started = time.perf_counter()
            run()
            seconds = time.perf_counter() - started
            if round_number:
                rates[name].append(nbytes / seconds / 1e9)
    return dict(rates)


def show(console: Console, title: str, rates: dict[str, list[float]]) -> None:
    table = Table("what", "GB/s", "quartiles", "of plain", title=title, title_justify="left")
    plain = max(float(np.median(r)) for name, r in rates.items() if name.startswith("plain"))
    for name, samples in rates.items():
        low, middle, high = np.quantile(samples, [0.25, 0.5, 0.75])
        share = f"{middle / plain:.0%}"
        table.add_row(name, f"{middle:.2f}", f"{low:.2f} .. {high:.2f}", share)
    console.print(table)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES))
    parser.add_argument("--page-sizes", nargs="+", type=int, help="tokens (16; on CUDA 16 64)")
    parser.add_argument("--orders", nargs="+", default=["random", "in order"])
    parser.add_argument("--megabytes", type=int, default=256, help="bytes moved per measurement")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="the JSON file (on CUDA in bench/results)")
    parser.add_argument(
        "--candidates", action="store_true", help="other ways to copy, too (on CUDA)"
    )
    options = parser.parse_args(arguments)
    on_cuda = options.device == "cuda"
    options.shapes = options.shapes or (CUDA_SHAPES if on_cuda else list(SHAPES))
    options.page_sizes = options.page_sizes or ([16, 64] if on_cuda else [16])
    if options.out is None:
        options.out = dated("transfer") if on_cuda else Path("bench/out/transfer.json")
    return options


def dated(name: str) -> Path:
    """Where a result of this machine's device is kept."""
    device = torch.cuda.get_device_name().replace(" ", "-")
    return RESULTS / f"{name}-{device}-{datetime.now(UTC):%Y-%m-%d}.json"


def machine(device: str) -> dict[str, object]:
    """What a result has to say about where it comes from."""
    found: dict[str, object] = {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "device": device,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "torch": torch.__version__,
    }
    if device == "cuda":
        found |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        found |= {name: version(name) for name in ("triton", "flashinfer-python", "sglang")}
    return found


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    console, results = Console(), []
    for name, page_size, order in itertools.product(
        options.shapes, options.page_sizes, options.orders
    ):
        world = World(SHAPES[name], page_size, options.megabytes, options.device, order)
        if options.device == "cpu":
            subjects = cpu_subjects(world)
        else:
            subjects = cuda_subjects(world, options.candidates)
        rates = measure(subjects, world.nbytes, options.rounds)
        costs = {}
        if options.device == "cuda":
            for pages in sorted({1, min(16, world.pages)}):
                costs |= enqueueing(world, pages, options.rounds)
        world.pins.close()
        show(console, f"{name}, page size {page_size}, {order}, {world.nbytes >> 20} MiB", rates)
        case = {"shape": name, "page_size": page_size, "order": order, "nbytes": world.nbytes}
        if options.device == "cuda":
            measured = measure_copies(world.pool)
            console.print(f"a server would measure at its start: {measured}")
            show_enqueueing(console, costs)
            case |= {"measured": measured.state(), "enqueueing": costs}
        results.append({**case, "gb_per_s": rates})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(
        json.dumps({**machine(options.device), "results": results}, indent=1) + "\n"
    )
    console.print(f"written to {options.out}")


if __name__ == "__main__":
    main()
