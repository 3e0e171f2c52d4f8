"""CPU attention of this package beside SGLang's torch_native, through SGLang's own interface.

    python bench/attention.py [--help]

Both backends run the attention of one forward pass (all layers, planning included) over the same
pool, in one process, turn by turn; figures are medians with quartiles. Slots are scattered over
the pool as in a cache in use, or in order as in a fresh one.
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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from rich.console import Console
from rich.table import Table
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from smg_sglang.engine.attention.cpu import CpuAttentionBackend

HERE = Path(__file__).parent
HEADS, KV_HEADS, DIM = 9, 3, 64  # SmolLM2-135M


@dataclass(frozen=True)
class Case:
    """A batch of equal requests: `cached` tokens in the pool, `new` ones to attend."""

    kind: str
    batch: int
    cached: int
    new: int
    layers: int = 30


CASES = [
    Case("cached prefix", 1, 2700, 16),
    Case("cached prefix", 4, 2700, 16, layers=4),
    Case("cached prefix", 1, 1024, 64, layers=4),
    Case("cached prefix", 1, 2048, 512, layers=4),
    *(Case("decode", b, n - 1, 1) for b in (1, 4, 8) for n in (128, 512, 2048, 4096)),
    *(Case("cold prefill", b, 0, n, layers=4) for b in (1, 4, 8) for n in (128, 512)),
    *(Case("cold prefill", 1, 0, n, layers=4) for n in (2048, 4096)),
]


class Pool:
    """What the backends use of SGLang's KV pool."""

    def __init__(self, slots: int, layers: int, dtype: torch.dtype):
        self.dtype = dtype
        size = (slots, KV_HEADS, DIM)
        self.k = [torch.randn(size).to(dtype) for _ in range(layers)]
        self.v = [torch.randn(size).to(dtype) for _ in range(layers)]

    def get_key_buffer(self, layer: int) -> torch.Tensor:
        return self.k[layer]

    def get_value_buffer(self, layer: int) -> torch.Tensor:
        return self.v[layer]

    def set_kv_buffer(self, layer, place, k, v) -> None:
        self.k[layer.layer_id][place.loc] = k
        self.v[layer.layer_id][place.loc] = v


class World:
    """A pool with the requests of a case in it, and the tensors of a forward pass."""

    def __init__(self, case: Case, dtype: torch.dtype, scattered: bool):
        torch.manual_seed(0)
        length = case.cached + case.new
        slots = 2 * case.batch * length + 1
        order = torch.randperm(slots) if scattered else torch.arange(slots)
        table = order[: case.batch * length].view(case.batch, length).int()
        self.runner = SimpleNamespace(
            device="cpu",
            req_to_token_pool=SimpleNamespace(req_to_token=table),
            token_to_kv_pool=Pool(slots, case.layers, dtype),
        )
        self.batch = forward_batch(case, table)
        tokens = case.batch * case.new
        self.q = torch.randn(tokens, HEADS * DIM).to(dtype)
        self.k, self.v = (torch.randn(tokens, KV_HEADS, DIM).to(dtype) for _ in range(2))
        self.layers = [
            RadixAttention(HEADS, DIM, DIM**-0.5, KV_HEADS, layer) for layer in range(case.layers)
        ]

    def forward(self, backend) -> torch.Tensor:
        backend.init_forward_metadata(self.batch)
        for layer in self.layers:
            out = backend.forward(self.q, self.k, self.v, layer, self.batch)
        return out


def forward_batch(case: Case, table: torch.Tensor) -> SimpleNamespace:
    full = torch.full((case.batch,), case.cached + case.new)
    return SimpleNamespace(
        forward_mode=ForwardMode.DECODE if case.kind == "decode" else ForwardMode.EXTEND,
        req_pool_indices=torch.arange(case.batch),
        seq_lens=full,
        extend_prefix_lens=torch.full_like(full, case.cached),
        extend_seq_lens=torch.full_like(full, case.new),
        out_cache_loc=table[:, case.cached :].reshape(-1).long(),
        encoder_lens=None,
    )


def measure(subjects: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds [first quartile, median, third quartile] of each, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for turn in range(rounds + 1):
        for name, run in subjects.items():
            start = time.perf_counter()
            run()
            if turn:  # the first round warms up
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.quantiles(values, n=4) for name, values in times.items()}


def run_case(case: Case, dtype: torch.dtype, scattered: bool, rounds: int) -> dict:
    world = World(case, dtype, scattered)
    stock, ours = TorchNativeAttnBackend(world.runner), CpuAttentionBackend(world.runner)
    torch.testing.assert_close(world.forward(ours), world.forward(stock), atol=3e-2, rtol=3e-2)
    times = measure(
        {"torch_native": lambda: world.forward(stock), "smg": lambda: world.forward(ours)},
        rounds,
    )
    ratio = times["torch_native"][1] / times["smg"][1]
    return {**asdict(case), "scattered": scattered, "ms": times, "times_faster": ratio}


def show(console: Console, title: str, results: list[dict]) -> None:
    table = Table(title=title)
    for heading in ("case", "batch", "cached", "new", "slots", "layers"):
        table.add_column(heading)
    for heading in ("torch_native ms", "smg ms", "times faster"):
        table.add_column(heading, justify="right")
    for result in results:
        spread = [
            f"{median:.1f} ({low:.1f}-{high:.1f})" for low, median, high in result["ms"].values()
        ]
        where = [str(result[name]) for name in ("batch", "cached", "new")]
        slots = "scattered" if result["scattered"] else "in order"
        table.add_row(
            result["kind"],
            *where,
            slots,
            str(result["layers"]),
            *spread,
            f"{result['times_faster']:.1f}",
        )
    console.print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--slots", nargs="+", default=["scattered"], help="scattered, in-order")
    parser.add_argument("--kinds", nargs="+", help="only these kinds of case, e.g. decode")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=HERE / "out" / "attention.json")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    console, written = Console(), []
    cases = [case for case in CASES if not options.kinds or case.kind in options.kinds]
    for name in options.dtypes:
        results = [
            run_case(case, getattr(torch, name), slots == "scattered", options.rounds)
            for slots in options.slots
            for case in cases
        ]
        show(console, f"{name}, {HEADS} query heads, {KV_HEADS} KV heads, dim {DIM}", results)
        written += [{"dtype": name, **result} for result in results]
    machine = {"machine": platform.machine(), "threads": options.threads, "load": os.getloadavg()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**machine, "results": written}, indent=1) + "\n")
    console.print(f"written to {options.out}")


if __name__ == "__main__":
    main()
