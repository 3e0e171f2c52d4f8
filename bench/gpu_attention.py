"""Attention over host pages on a CUDA device: what merging costs, how fast contexts stream, and how
much copies slow a running decode.

    python bench/gpu_attention.py [--help]

One process; what is compared takes turns in every round, and figures are medians with quartiles of
CUDA events. Has not run on a GPU yet: there are no results until somebody runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file, as the other benchmarks are

from bench.transfer import SHAPES, Shape, World, dated, machine
from smg_sglang.attention.batch import KV, Rule
from smg_sglang.attention.device import DeviceAttention, merge_into
from smg_sglang.attention.host import HostReader, HostRun
from smg_sglang.attention.kernels import Kind, make_kernels
from smg_sglang.attention.paged import PagedKeys, Planned, heads_of, one_slot_pages
from smg_sglang.attention.partial import PartialState
from smg_sglang.transfer.cuda import CudaMover
from smg_sglang.transfer.segments import SegmentRing

QUERY_HEADS = {"Llama-3.1-8B": 32, "Qwen2.5-7B": 28, "DeepSeek-V2-Lite": 16}
WIDTH = {"Llama-3.1-8B": 4096, "Qwen2.5-7B": 3584, "DeepSeek-V2-Lite": 2048}
#: Of MLA's latents, the width of the values.
LATENT = 512
CUDA = torch.device("cuda")
PAGE = 16
RULE = Rule(128**-0.5)

Subjects = dict[str, Callable[[], None]]


def milliseconds(subjects: Subjects, rounds: int) -> dict[str, list[float]]:
    """Of each subject in each round, by CUDA events; two rounds warm up."""
    times: dict[str, list[float]] = defaultdict(list)
    for round_number in range(rounds + 2):
        for name, run in subjects.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            run()
            end.record()
            end.synchronize()
            if round_number >= 2:
                times[name].append(begin.elapsed_time(end))
    return dict(times)


def some(*size: int, device: str = "cuda") -> torch.Tensor:
    return torch.randn(*size, dtype=torch.bfloat16, device=device)


def some_keys(shape: Shape, slots: int) -> KV:
    """A pool of this shape: keys and values, or latents."""
    k = some(slots, shape.heads, shape.dim)
    return KV(k, k[..., :LATENT] if shape.parts == 1 else some(slots, shape.heads, shape.dim))


def kind_for(shape: Shape) -> Kind:
    return Kind.LATENT if shape.parts == 1 else Kind.PAGED


# ---- two merged segments beside one ----


def merging(shape: Shape, q_heads: int, new: int, keys: int, backend: str) -> Subjects:
    """The same keys in one segment, and in two that are merged; `new` queries after all of them."""
    kernels = make_kernels(kind_for(shape), CUDA, backend=backend)
    q, kv = some(new, q_heads, shape.dim), some_keys(shape, keys)
    table = torch.randperm(keys // PAGE, device="cuda").to(torch.int32)

    def planned(first: int, end: int) -> Planned:
        pages = PagedKeys([(end - first) * PAGE], table[first:end], PAGE)
        return kernels.planned(pages, [new], RULE, heads_of(q, kv), causal=False)

    middle = keys // PAGE // 2
    whole, first, second = planned(0, 2 * middle), planned(0, middle), planned(middle, 2 * middle)

    def one() -> None:
        whole(q, kv)

    def two() -> None:
        state = first(q, kv)
        state = PartialState(state.out.float(), state.lse)
        merge_into(state, second(q, kv)).out.to(q.dtype)

    return {"one segment": one, "two, merged": two}


# ---- contexts streamed from host memory ----


def streaming(world: World, shape: Shape, q_heads: int, *, new: int) -> Subjects:
    """All layers of one pass of a request whose context is in host memory, but for `new` tokens."""
    layout = world.pool.layout
    ring = SegmentRing(layout, CUDA, 8192 // layout.page_size, pins=world.pins)
    world.pins.pin(world.arena.buffer, CUDA)
    if not world.pins.wait(world.arena.buffer):
        raise SystemExit("the driver does not page-lock the arena (see `ulimit -l`)")
    reader = HostReader(layout, ring)
    run = HostRun(world.arena.buffer, world.offsets, layout.page_size)
    q, pool = some(new, q_heads, shape.dim), some_keys(shape, new)
    out = q.new_empty(new, q_heads, pool.v.shape[2])
    slots = torch.arange(new, dtype=torch.int32, device=CUDA)

    def streamed(kind: Kind) -> Callable[[], None]:
        attention = DeviceAttention(make_kernels(kind, CUDA))

        def step() -> None:
            plan = attention.plan(one_slot_pages(slots, [new]), [new], [[run]], reader)
            for layer in range(layout.num_layers):
                attention.attend(q, pool, plan, RULE, out, layer)

        return step

    target = torch.ones(world.nbytes, dtype=torch.uint8, device=CUDA)
    host = torch.ones(world.nbytes, dtype=torch.uint8, pin_memory=True)
    return {
        "streamed": streamed(kind_for(shape)),
        "streamed, as plain products": streamed(Kind.EXACT),
        "one pinned copy of the same bytes": lambda: target.copy_(host, non_blocking=True),
    }


# ---- copies beside a decode ----


class Decode:
    """Something like a decode step: each layer's weights are read, and each request's keys."""

    def __init__(self, shape: Shape, width: int, q_heads: int, batch: int, context: int):
        self.layers = shape.layers
        self.x = some(batch, width)
        self.weights = [some(width, 4 * width) for _ in range(4)]  # larger than the L2 cache
        self.back = some(4 * width, width)
        self.q = some(batch, q_heads, shape.dim)
        self.kv = some_keys(shape, batch * context)
        kernels = make_kernels(kind_for(shape), CUDA)
        slots = torch.randperm(batch * context, device="cuda").to(torch.int32)
        keys = one_slot_pages(slots, [context] * batch)
        heads = heads_of(self.q, self.kv)
        self.attend = kernels.planned(keys, [1] * batch, RULE, heads, causal=True)

    def step(self) -> None:
        for layer in range(self.layers):
            _ = (self.x @ self.weights[layer % len(self.weights)]) @ self.back
            self.attend(self.q, self.kv)


@contextmanager
def copying(world: World, programs: int, direction: str):
    """Pages move all the while, as the loads of other requests would."""
    mover = CudaMover(world.pool, shared_pins=world.pins, programs=programs)
    move = mover.prepare(world.slots, world.arena.buffer, world.offsets)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            if direction == "spill":
                mover.spill(move)
                continue
            with mover.loading([move], ()) as moves:  # behind nothing: all the while
                for layers in mover.load_groups(moves):
                    mover.load_layers(layers, moves[0])
                mover.mark().synchronize()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def interference(world: World, decode: Decode, rounds: int, programs: list[int]):
    """Milliseconds of a decode step alone, and while pages move."""
    times = milliseconds({"alone": decode.step}, rounds)
    for direction in ("load", "spill"):
        for count in programs:
            with copying(world, count, direction):
                name = f"beside a {direction}, {count} programs"
                times[name] = milliseconds({name: decode.step}, rounds)[name]
    times["alone, again"] = milliseconds({"alone": decode.step}, rounds)["alone"]
    return times


# ---- reports ----


def show(console: Console, title: str, times: dict[str, list[float]], nbytes: int = 0) -> None:
    table = Table("what", "ms", "quartiles", "of the first", title=title, title_justify="left")
    first = float(np.median(next(iter(times.values()))))
    for name, samples in times.items():
        low, middle, high = np.quantile(samples, [0.25, 0.5, 0.75])
        rate = f" ({nbytes / middle / 1e6:.1f} GB/s)" if nbytes else ""
        share = f"{middle / first:.1%}"
        table.add_row(name, f"{middle:.3f}{rate}", f"{low:.3f} .. {high:.3f}", share)
    console.print(table)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--shapes", nargs="+", default=list(QUERY_HEADS), choices=list(QUERY_HEADS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--megabytes", type=int, default=2048, help="of KV in host memory")
    parser.add_argument("--backends", nargs="+", default=["fa2", "auto"], help="FlashInfer's")
    parser.add_argument("--programs", nargs="+", type=int, default=[8, 16, 32])
    parser.add_argument("--out", type=Path)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        raise SystemExit("bench/gpu_attention.py needs a CUDA device; PyTorch sees none")
    console, results = Console(), []

    def report(kind: str, case: dict[str, object], times: dict[str, list[float]], nbytes: int = 0):
        title = f"{kind}: " + ", ".join(f"{name} {value}" for name, value in case.items())
        show(console, title, times, nbytes)
        results.append({"kind": kind, **case, "nbytes": nbytes, "ms": times})

    for name in options.shapes:
        shape, q_heads = SHAPES[name], QUERY_HEADS[name]
        for backend in options.backends:
            for new, keys in [(8192, 16384), (2048, 65536), (1, 65536)]:
                case = {"shape": name, "backend": backend, "queries": new, "keys": keys}
                subjects = merging(shape, q_heads, new, keys, backend)
                report("merging", case, milliseconds(subjects, options.rounds))
        world = World(shape, PAGE, options.megabytes, "cuda", "random")
        tokens = world.pages * PAGE
        for new in (1, 8192):
            case = {"shape": name, "queries": new, "context": tokens}
            times = milliseconds(streaming(world, shape, q_heads, new=new), options.rounds)
            report("streaming", case, times, world.nbytes)
        decode = Decode(shape, WIDTH[name], q_heads, batch=16, context=4096)
        times = interference(world, decode, options.rounds, options.programs)
        report("interference", {"shape": name, "batch": 16, "context": 4096}, times)
        world.pins.close()
        del world, decode
        torch.cuda.empty_cache()
    out = options.out or dated("attention")
    out.parent.mkdir(parents=True, exist_ok=True)
    found = {**machine("cuda"), "load": os.getloadavg()[0], "results": results}
    out.write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"written to {out}")


if __name__ == "__main__":
    main()
