"""Programs on servers that take turns, each from empty caches."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.programs import few_shot
from bench.programs.compare import compare_outputs
from bench.programs.endpoint import CountingEndpoint
from bench.serving.statistics import compare, spread
from bench.serving.subjects import SMG, STOCK
from tools.sglang_server import SglangServer

Result = dict[str, Any]
Program = Callable[[CountingEndpoint, int], list[str]]
FIGURES = ("seconds", "device", "host", "prompt_tokens", "output_tokens", "requests")


@dataclass
class Runs:
    """All runs of one program on one server."""

    rows: list[Result] = field(default_factory=list)
    outputs: list[list[str]] = field(default_factory=list)

    def medians(self) -> Result:
        figures = {name: spread([row[name] for row in self.rows]) for name in FIGURES}
        if ttft := [second for row in self.rows for second in row["ttft_s"]]:
            figures["ttft_s"] = spread(ttft)
        return figures


def run_once(
    program: Program, server: SglangServer, endpoint: CountingEndpoint, size: int
) -> tuple[Result, list[str]]:
    """One run from an empty cache: what it cost and what it said."""
    server.flush()
    endpoint.start()
    began = time.perf_counter()
    outputs = program(endpoint, size)
    counts = endpoint.counts
    row = {
        "seconds": time.perf_counter() - began,
        "requests": len(counts.prompt_tokens),
        "prompt_tokens": sum(counts.prompt_tokens),
        "output_tokens": sum(counts.output_tokens),
        "device": counts.share("device"),
        "host": counts.share("host"),
        "ttft_s": list(counts.ttft_s),
    }
    return row, outputs


def take_turns(
    program: Program,
    servers: Mapping[str, SglangServer],
    size: int,
    repeats: int,
    advance: Callable[[], Any] = lambda: None,
) -> Result:
    """Stock and ours in the order A B, B A, ..."""
    endpoints = {name: CountingEndpoint(server.url) for name, server in servers.items()}
    runs = {name: Runs() for name in servers}
    for repeat in range(repeats):
        for name in list(servers)[:: -1 if repeat % 2 else 1]:
            row, outputs = run_once(program, servers[name], endpoints[name], size)
            runs[name].rows.append(row)
            runs[name].outputs.append(outputs)
            advance()
    return summary(runs)


def warm_up(servers: Mapping[str, SglangServer]) -> None:
    """A program on each server that is not measured: caches of compilers, grammars, allocators."""
    for server in servers.values():
        run_once(few_shot.run, server, CountingEndpoint(server.url), 0)


def summary(runs: Mapping[str, Runs]) -> Result:
    """Figures of each server, ours over stock, and whose outputs are whose."""
    reference = runs[STOCK].outputs[0]
    seconds = {name: [row["seconds"] for row in run.rows] for name, run in runs.items()}
    return {
        "subjects": {name: run.medians() for name, run in runs.items()},
        "seconds_ratio": compare(seconds[SMG], seconds[STOCK]),
        "ours_against_stock": vars(compare_outputs(reference, runs[SMG].outputs)),
        "stock_against_itself": vars(compare_outputs(reference, runs[STOCK].outputs[1:])),
        "outputs": list(reference),
        "runs": {name: run.rows for name, run in runs.items()},
    }
