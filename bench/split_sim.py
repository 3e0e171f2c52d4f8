"""For which lengths, and which P:D, is a split better than one pool? Simulated, plotted.

Discrete events. The routing is the server's own (`smg_sglang.phase`); workers are SGLang schedulers
as far as it matters here: prefill comes first, in chunks, and stalls the tokens of everyone in that
worker. Both sides have the same workers; without a split each does all of its requests. Costs come
from measurements (`Costs`). Nothing is reused between requests, and memory is never full.

`--trace` takes a Mooncake trace (JSON lines with `input_length` and `output_length`, .gz or not):
https://github.com/kvcache-ai/Mooncake, `FAST25-release/traces/conversation_trace.jsonl`.
"""

from __future__ import annotations

import argparse
import gzip
import heapq
import json
import random
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import numpy as np

from smg_sglang.phase.actions import Action, SendCopy, SendOriginal
from smg_sglang.phase.controller import PhaseController
from smg_sglang.phase.requests import Arrival, Role
from smg_sglang.phase.routing import RoutingConfig

OUT = Path(__file__).parent / "out"
PAGE = 16


@dataclass(frozen=True)
class Costs:
    """Seconds of one worker. Defaults: SmolLM2-135M bf16 on one CPU core (docs/split.md).

    Attributes:
        token: to prefill one token.
        context: more for each token of context before it.
        step: a decode step, or what a prefill batch takes beside its tokens.
        stream: more for each stream in it.
        load: to load one token's KV from host memory.
        hand_off: of the hand-off beside that: routing, publishing the last pages.
        chunk: prefill tokens a batch.
    """

    token: float = 1.4e-3
    context: float = 1.05e-6
    step: float = 55e-3
    stream: float = 3.5e-3
    load: float = 2.7e-5
    hand_off: float = 5e-3
    chunk: int = 2048

    def prefill(self, tokens: int, context: int) -> float:
        return tokens * (self.token + self.context * (context + tokens / 2))

    def decode(self, streams: int) -> float:
        return self.step + self.stream * streams


@dataclass
class Job:
    """A request or copy at a worker."""

    rid: str
    left: int
    done: int
    answer: int
    load_s: float = 0.0


@dataclass
class Seen:
    """What a client saw of its request."""

    arrived: float
    prompt: int
    tokens: list[float] = field(default_factory=list)

    def kept(self, ttft: float, gap: float, stall: float) -> bool:
        gaps = np.diff(self.tokens) if len(self.tokens) > 1 else np.zeros(1)
        in_time = float(np.percentile(gaps, 99)) <= gap and float(gaps.max()) <= stall
        return self.tokens[0] - self.arrived <= ttft and in_time


class Simulation:
    """One run. Time in seconds from its start."""

    def __init__(self, prefill: int, decode: int, costs: Costs, split_tokens: int = 128) -> None:
        self.controller = PhaseController(
            prefill, decode, RoutingConfig(split_tokens=split_tokens, patience_s=1e9)
        )
        self.costs = costs
        self.now = 0.0
        self.seen: dict[str, Seen] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._answers: dict[str, int] = {}
        total = prefill + decode
        self._waiting: list[deque[Job]] = [deque() for _ in range(total)]
        self._running: list[list[Job]] = [[] for _ in range(total)]
        self._busy = [False] * total
        for worker in range(total):
            self.controller.worker_ready(worker, 0.0)

    def run(self, requests: Sequence[tuple[float, int, int]]) -> list[Seen]:
        """(arrival, prompt tokens, answer tokens) of each request."""
        for number, (at, prompt, answer) in enumerate(requests):
            self._at(at, lambda n=number, p=prompt, a=answer: self._arrive(f"r{n}", p, a))
        while self._events:
            self.now, _, event = heapq.heappop(self._events)
            event()
        return list(self.seen.values())

    def _at(self, when: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), event))

    def _arrive(self, rid: str, prompt: int, answer: int) -> None:
        self.seen[rid] = Seen(self.now, prompt)
        self._answers[rid] = answer
        self._do(self.controller.arrived(Arrival(rid, prompt), self.now))

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case SendCopy(_, copy_rid, worker):
                    prompt = self.seen[copy_rid.split("#")[0]].prompt
                    self._give(worker, Job(copy_rid, prompt, 0, 1))
                case SendOriginal(_, rid, worker):
                    self._give(worker, self._job(rid))

    def _job(self, rid: str) -> Job:
        prompt, answer = self.seen[rid].prompt, self._answers[rid]
        if self.controller.requests[rid].route.value != "split":
            return Job(rid, prompt, 0, answer)
        loaded = (prompt - 1) // PAGE * PAGE
        return Job(rid, prompt - loaded, loaded, answer, loaded * self.costs.load)

    def _give(self, worker: int, job: Job) -> None:
        self._waiting[worker].append(job)
        if not self._busy[worker]:
            self._step(worker)

    def _step(self, worker: int) -> None:
        """The next batch of a worker: prefill first, as SGLang does."""
        self._busy[worker] = bool(self._waiting[worker] or self._running[worker])
        if self._waiting[worker]:
            self._prefill(worker)
        elif self._running[worker]:
            seconds = self.costs.decode(len(self._running[worker]))
            self._at(self.now + seconds, lambda: self._decoded(worker))

    def _prefill(self, worker: int) -> None:
        room, seconds, batch = self.costs.chunk, self.costs.step, []
        for job in self._waiting[worker]:
            tokens = min(job.left, room)
            seconds += self.costs.prefill(tokens, job.done) + job.load_s
            job.left, job.done, job.load_s = job.left - tokens, job.done + tokens, 0.0
            room -= tokens
            batch.append(job)
            if room == 0:
                break
        self._at(self.now + seconds, lambda: self._prefilled(worker, batch))

    def _prefilled(self, worker: int, batch: list[Job]) -> None:
        for job in [job for job in batch if job.left == 0]:
            self._waiting[worker].remove(job)
            if self.controller.workers[worker].role is Role.PREFILL:
                self._at(self.now + self.costs.hand_off, lambda j=job: self._handed(j.rid, worker))
            else:
                self._token(worker, job)
                self._running[worker].append(job)
        self._running[worker] = [job for job in self._running[worker] if job.answer > 0]
        self._step(worker)

    def _handed(self, copy_rid: str, worker: int) -> None:
        self._do(self.controller.prefilled(copy_rid, worker, self.now))

    def _decoded(self, worker: int) -> None:
        for job in self._running[worker]:
            self._token(worker, job)
        self._running[worker] = [job for job in self._running[worker] if job.answer > 0]
        self._step(worker)

    def _token(self, worker: int, job: Job) -> None:
        job.answer -= 1
        self.seen[job.rid].tokens.append(self.now)
        self.controller.answered(job.rid, worker, self.now, finished=job.answer == 0)


# ---- the question ----

Lengths = list[tuple[int, int]]


@dataclass(frozen=True)
class Promise:
    """A request is served well when its first token comes within `ttft_factor` times its prefill on
    an idle worker plus `ttft_s`, 99 % of its tokens within `gap_s` of the one before, and all
    within `stall_s`."""

    ttft_factor: float = 4.0
    ttft_s: float = 1.0
    gap_s: float = 0.3
    stall_s: float = float("inf")
    share: float = 0.9


Shape = tuple[int, int]
"""(prefill workers, decode workers)"""


def attainment(
    shape: Shape, costs: Costs, lengths: Lengths, rate: float, promise: Promise
) -> float:
    """The share of requests served well at so many requests a second."""
    rng, at, requests = random.Random(7), 0.0, []
    for prompt, answer in lengths:
        at += rng.expovariate(rate)
        requests.append((at, prompt, answer))
    seen = Simulation(*shape, costs).run(requests)
    good = 0
    for one in seen:
        ttft = promise.ttft_s + promise.ttft_factor * costs.prefill(one.prompt, 0)
        good += one.kept(ttft, promise.gap_s, promise.stall_s)
    return good / len(seen)


def best_rate(
    shape: Shape, costs: Costs, lengths: Lengths, promise: Promise, steps: int = 9
) -> float:
    """The highest rate at which `promise.share` of the requests are served well."""
    mean = float(np.mean([costs.prefill(p, 0) + a * costs.step / 8 for p, a in lengths]))
    low, high = 0.0, 3 * sum(shape) / mean
    for _ in range(steps):
        middle = (low + high) / 2
        good = attainment(shape, costs, lengths, middle, promise)
        low, high = (middle, high) if good >= promise.share else (low, middle)
    return low


def rates_of(workers: int, costs: Costs, lengths: Lengths, promise: Promise) -> dict[str, float]:
    """Requests a second by "P:D"; the first is one pool."""
    return {
        f"{shape[0]}:{shape[1]}": best_rate(shape, costs, lengths, promise)
        for shape in splits(workers)
    }


def splits(workers: int) -> list[Shape]:
    """All P:D of so many workers; (0, n) is one pool."""
    return [(prefill, workers - prefill) for prefill in range(workers)]


def fixed(prompt: int, answer: int, number: int) -> Lengths:
    """Lengths that vary by half around a prompt's and an answer's."""
    rng = random.Random(prompt * 31 + answer)
    return [
        (max(1, int(prompt * rng.uniform(0.5, 1.5))), max(1, int(answer * rng.uniform(0.5, 1.5))))
        for _ in range(number)
    ]


def from_trace(path: Path, number: int, scale: float) -> Lengths:
    """Every nth request of a trace, its lengths times `scale`."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt") as stream:
        rows = [json.loads(line) for line in stream]
    chosen = rows[:: max(1, len(rows) // number)][:number]
    return [
        (max(1, int(r["input_length"] * scale)), max(1, int(r["output_length"] * scale)))
        for r in chosen
    ]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/split_sim.py", description=__doc__)
    add = parser.add_argument
    add("--workers", type=int, default=4)
    add("--requests", type=int, default=150, help="requests a run (150)")
    add("--trace", type=Path, help="a Mooncake trace, to answer for its lengths too")
    add("--trace-scale", type=float, default=0.25, help="its lengths are multiplied by this (0.25)")
    add("--gap-ms", type=float, default=300.0, help="promised inter-token latency (300)")
    add("--stall-ms", type=float, default=1000.0, help="and the longest wait for a token (1000)")
    for name, value in vars(Costs()).items():
        add(f"--cost-{name.replace('_', '-')}", type=type(value), default=value)
    add("--out", type=Path, default=OUT / "split_sim.json")
    return parser.parse_args(arguments)


PROMPTS = (250, 500, 1000, 2000, 4000, 8000)
ANSWERS = (25, 50, 100, 200, 400)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    costs = Costs(**{name: getattr(options, f"cost_{name}") for name in vars(Costs())})
    gap = replace(Promise(), gap_s=options.gap_ms / 1000)
    answers = []
    for title, promise in (
        (f"99 % of tokens within {options.gap_ms:.0f} ms", gap),
        (
            f"... and all within {options.stall_ms:.0f} ms",
            replace(gap, stall_s=options.stall_ms / 1000),
        ),
    ):
        print(title)
        answers.append(Frontier(title, promise, *explore(options, costs, promise)))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(
        json.dumps({"costs": vars(costs), "frontiers": [a.plain() for a in answers]})
    )
    plot(answers, options)
    print(f"{options.out}\n{options.out.with_suffix('.png')}")
    return 0


Rates = dict[str, float]


@dataclass(frozen=True)
class Frontier:
    """Under one promise: rates by (prompt, answer) tokens, and of the trace by workers."""

    title: str
    promise: Promise
    grid: dict[tuple[int, int], Rates]
    trace: dict[int, Rates]

    def plain(self) -> dict[str, object]:
        grid = [{"prompt": p, "answer": a, "rates": r} for (p, a), r in self.grid.items()]
        promise = {name: str(value) for name, value in vars(self.promise).items()}
        return {"title": self.title, "promise": promise, "grid": grid, "trace": self.trace}


def explore(
    options: argparse.Namespace, costs: Costs, promise: Promise
) -> tuple[dict[tuple[int, int], Rates], dict[int, Rates]]:
    """All mixes, and the trace where there is one."""
    grid = {}
    for prompt in PROMPTS:
        for answer in ANSWERS:
            lengths = fixed(prompt, answer, options.requests)
            grid[prompt, answer] = rates_of(options.workers, costs, lengths, promise)
            print(f"{prompt:5d} in, {answer:4d} out: " + _row(grid[prompt, answer]), flush=True)
    trace = {}
    if options.trace is not None:
        lengths = from_trace(options.trace, 2 * options.requests, options.trace_scale)
        for workers in (2, 4, 8):
            trace[workers] = rates_of(workers, costs, lengths, promise)
            print(f"trace, {workers} workers: " + _row(trace[workers]), flush=True)
    return grid, trace


def _row(rates: dict[str, float]) -> str:
    pool = next(iter(rates.values()))
    best = max(rates, key=lambda name: rates[name])
    words = ", ".join(f"{name} {rate:.3f}/s" for name, rate in rates.items())
    times = f"{rates[best] / pool:.2f}x one pool" if pool else "one pool cannot"
    return f"{words}; best {best}, {times}"


def plot(answers: list[Frontier], options: argparse.Namespace) -> None:
    """A column a promise: the gain over one pool by lengths, below it the trace by P:D."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = 2 if answers[0].trace else 1
    figure, axes = plt.subplots(rows, len(answers), figsize=(13, 4.6 * rows), squeeze=False)
    for column, found in enumerate(answers):
        _heat(axes[0, column], found, options.workers)
        if rows == 2:
            _bars(axes[1, column], found)
    figure.tight_layout()
    figure.savefig(options.out.with_suffix(".png"), dpi=110)
    plt.close(figure)


MOST = 8.0
"""Gains beyond this are drawn as this."""


def _gain(rate: float, pool: float) -> float:
    if rate == 0.0:
        return 1.0 if pool == 0.0 else 0.0
    return MOST if pool == 0.0 else min(MOST, rate / pool)


def _heat(axis, found: Frontier, workers: int) -> None:
    gains = np.zeros((len(ANSWERS), len(PROMPTS)))
    for (prompt, answer), rates in found.grid.items():
        pool = next(iter(rates.values()))
        best = max(list(rates)[1:], key=lambda name: rates[name])
        row, column = ANSWERS.index(answer), PROMPTS.index(prompt)
        gains[row, column] = gain = _gain(rates[best], pool)
        label = f"{gain:.1f}x" + ("+" if gain == MOST else "") + f"\n{best}"
        axis.text(column, row, label, ha="center", va="center", fontsize=8)
    scaled = np.log2(np.clip(gains, 1 / MOST, MOST))
    axis.imshow(scaled, cmap="RdBu", vmin=-3, vmax=3, origin="lower", aspect="auto")
    axis.set_xticks(range(len(PROMPTS)), PROMPTS)
    axis.set_yticks(range(len(ANSWERS)), ANSWERS)
    axis.set_xlabel("prompt tokens")
    axis.set_ylabel("answer tokens")
    axis.set_title(f"best split over one pool of {workers} workers: {found.title}", fontsize=9)


def _bars(axis, found: Frontier) -> None:
    names, heights, colours = [], [], []
    for rates in found.trace.values():
        pool = next(iter(rates.values()))
        for name, rate in rates.items():
            names.append(f"pool of {name[2:]}" if name.startswith("0:") else name)
            heights.append(rate)
            colours.append("#8a8f98" if name.startswith("0:") else "#2467c9")
        names.append("")
        heights.append(pool * 0)
        colours.append("white")
    axis.bar(range(len(names)), heights, color=colours)
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axis.set_ylabel("requests a second")
    axis.set_title(
        f"Mooncake conversation trace, prefill:decode workers: {found.title}", fontsize=9
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
