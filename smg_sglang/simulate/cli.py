"""`python -m smg_sglang simulate TRACE`: what the server would do with a trace."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from smg_sglang.config import DEFAULT_EVICTION, EvictionName, WritePolicy
from smg_sglang.errors import ConfigError, SmgError
from smg_sglang.simulate import bounds
from smg_sglang.simulate.model import MODELS, model_cost
from smg_sglang.simulate.plot import plot_sweep
from smg_sglang.simulate.report import block_table, run_table, sweep_table
from smg_sglang.simulate.run import simulate
from smg_sglang.simulate.settings import Settings
from smg_sglang.simulate.sweep import run_sweep, write_csv
from smg_sglang.trace import Request, TraceFormat, load_trace

#: (10^12 FLOP/s, 10^9 bytes/s, ms a token). The first was measured with `make bench` on 2 cores of
#: an AMD EPYC; the second is an estimate for an H100 with PCIe 5.
_RATES = {"smollm2-135m": (0.14, 12.0, 60.0)}
_ESTIMATE = (400.0, 50.0, 20.0)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 2 for a wrong choice or a bad trace, in one sentence."""
    options = _parser().parse_args(arguments)
    try:
        _run(options, Console())
    except (SmgError, OSError) as error:
        print(f"smg_sglang simulate: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace, console: Console) -> None:
    requests = load_trace(
        options.trace,
        options.format,
        block_tokens=options.block_tokens,
        scale_to=options.scale_to,
        session_gap_s=options.session_gap,
    )[: options.limit]
    title = Path(options.trace).name
    policies = _policies(options.policy)
    if options.blocks:
        result: Any = _blocks(requests, policies, options.blocks, title, console)
    elif options.sweep is not None or len(policies) > 1:
        result = _sweep(options, requests, policies, title, console)
    else:
        settings = _settings(options, policies[0])
        with _progress(len(requests)) as tell:
            result = simulate(requests, settings, lambda done: tell("requests", done))
        console.print(run_table(result, title))
    if options.json:
        data = msgspec.json.format(msgspec.json.encode(result))
        Path(options.json).write_bytes(data + b"\n")


def _sweep(
    options: argparse.Namespace,
    requests: list[Request],
    policies: list[EvictionName],
    title: str,
    console: Console,
) -> Any:
    sizes = options.sweep if options.sweep is not None else [options.host_gb]
    with _progress(len(requests)) as tell:
        settings = _settings(options, policies[0])
        result = run_sweep(requests, settings, policies, sizes or None, tell)
    console.print(sweep_table(result, title))
    if options.sweep is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        stem = options.out / f"{title.split('.', maxsplit=1)[0]}_sweep"
        write_csv(result, stem.with_suffix(".csv"))
        plot_sweep(result, title, stem.with_suffix(".png"))
        console.print(f"written: {stem}.csv, {stem}.png", soft_wrap=True)
    return result


def _blocks(
    requests: list[Request],
    policies: list[EvictionName],
    sizes: list[int],
    title: str,
    console: Console,
) -> dict[str, Any]:
    """Single levels of so many blocks, counting block references as analyses of traces do."""
    paths = bounds.block_paths(requests)
    total = bounds.units(paths)
    runs = bounds.make_runs(paths)
    rows: list[tuple[int, dict[str, float]]] = []
    for size in sizes:
        hits = {"flat lru": bounds.flat_lru_hits(paths, size)}
        for policy in policies:
            unit = requests[0].block_tokens
            hits[policy] = bounds.level_hits(paths, size, policy, unit)
        hits["optimum"] = bounds.belady_hits(runs, size)
        rows.append((size, {name: count / total for name, count in hits.items()}))
    infinite = bounds.infinite_hits(runs) / total
    console.print(block_table(rows, infinite, f"{title}: {total:,} references to blocks"))
    return {"block_references": total, "infinite": infinite, "shares": dict(rows)}


def _settings(options: argparse.Namespace, policy: EvictionName) -> Settings:
    model = model_cost(options.model)
    tflops, link_gbps, itl_ms = _RATES.get(options.model, _ESTIMATE)
    if options.device_tokens is None:
        raise ConfigError("--device-tokens is needed: the server's --max-total-tokens.")
    settings = Settings(
        model=model,
        device_tokens=options.device_tokens,
        host_gb=options.host_gb,
        page_size=options.page_size,
        eviction=policy,
        write_policy=WritePolicy(options.write_policy),
        chunk_tokens=options.chunk_tokens,
        max_running=options.max_running,
        tflops=options.tflops or tflops,
        link_gbps=options.link_gbps or link_gbps,
        itl_ms=itl_ms if options.itl_ms is None else options.itl_ms,
        closed=options.closed,
        time_scale=options.time_scale,
    )
    return _checked(settings)


def _checked(settings: Settings) -> Settings:
    for name in ("page_size", "chunk_tokens", "max_running", "tflops", "link_gbps", "time_scale"):
        if not getattr(settings, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0.")
    if settings.device_pages < 2:
        raise ConfigError("--device-tokens must be two pages at least.")
    if settings.chunk_tokens < settings.page_size:
        raise ConfigError("--chunk-tokens must be a page at least.")
    if not settings.host_gb >= 0 or not settings.itl_ms >= 0:
        raise ConfigError("--host-gb and --itl-ms must not be negative.")
    return settings


def _policies(text: str) -> list[EvictionName]:
    if text == "all":
        return list(EvictionName)
    names = text.split(",")
    for name in names:
        if name not in list(EvictionName):
            known = ", ".join(EvictionName)
            raise ConfigError(f"--policy must be some of {known}, or all, not {name!r}.")
    return [EvictionName(name) for name in names]


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str, int], None]]:
    """A bar on stderr: which run is at how many requests."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    stderr = Console(stderr=True)
    quiet = not stderr.is_terminal
    with Progress(*columns, TimeElapsedColumn(), console=stderr, disable=quiet) as bar:
        tasks: dict[str, Any] = {}

        def tell(what: str, done: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        yield tell


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",") if part]


def _counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m smg_sglang simulate",
        description="Replay a trace through the server's own trees and books, without a model: "
        "hits by tier, loads, spills, prefill time saved. See docs/simulator.md.",
    )
    add = parser.add_argument
    add("trace", help="Mooncake, Qwen-Bailian or token JSONL (.gz), agent sessions (.tgz, folder)")
    _add_trace(add)
    _add_server(add)
    _add_machine(add)
    add(
        "--sweep",
        type=_numbers,
        nargs="?",
        const=[],
        metavar="GIB,...",
        help="a run for each size of host memory (default: from none to all that the trace "
        "fills), written as CSV and PNG, with an infinite cache and Belady's optimum",
    )
    add(
        "--blocks",
        type=_counts,
        metavar="N,...",
        help="instead of a server: one level of N blocks of the trace, hits as a share of "
        "references to blocks, as in published analyses",
    )
    add("--out", type=Path, default=Path(), metavar="DIR", help="for the sweep's files")
    add("--json", metavar="PATH", help="write every figure")
    return parser


def _add_trace(add: Callable[..., Any]) -> None:
    add("--format", choices=[f.value for f in TraceFormat], help="(default: told by its fields)")
    add("--limit", type=int, metavar="N", help="only the first N requests")
    add("--scale-to", type=int, metavar="TOKENS", help="map each block to so many tokens")
    add("--block-tokens", type=int, metavar="TOKENS", help="tokens a block, if not the usual")
    add(
        "--session-gap",
        type=float,
        default=0.0,
        metavar="S",
        help="seconds between the beginnings of agent sessions (default: all at once)",
    )
    add("--closed", action="store_true", help="one request after another; no timestamps")
    add(
        "--time-scale",
        type=float,
        default=1.0,
        metavar="X",
        help="multiply arrival times; above 1 is a slower trace",
    )


def _add_server(add: Callable[..., Any]) -> None:
    add("--device-tokens", type=int, metavar="N", help="the server's --max-total-tokens")
    add("--host-gb", type=float, default=0.0, metavar="GIB", help="--smg-host-gb (default: 0)")
    add("--page-size", type=int, default=16, metavar="TOKENS", help="(default: %(default)s)")
    add(
        "--policy",
        default=DEFAULT_EVICTION.value,
        metavar="NAME,...",
        help=f"eviction in host memory: {', '.join(EvictionName)}; several or `all` are compared "
        "(default: %(default)s)",
    )
    add(
        "--write-policy",
        choices=[policy.value for policy in WritePolicy],
        default=WritePolicy.WRITE_THROUGH.value,
        help="(default: %(default)s)",
    )
    add(
        "--chunk-tokens",
        type=int,
        default=8192,
        metavar="N",
        help="--chunked-prefill-size (default: %(default)s)",
    )
    add(
        "--max-running",
        type=int,
        default=256,
        metavar="N",
        help="--max-running-requests (default: %(default)s)",
    )


def _add_machine(add: Callable[..., Any]) -> None:
    add(
        "--model",
        default="llama-3.1-8b",
        metavar="NAME",
        help=f"{', '.join(MODELS)}, or a config.json (default: %(default)s)",
    )
    add(
        "--tflops",
        type=float,
        metavar="T",
        help="prefill speed in 10^12 FLOP/s (default: 400, an H100; 0.14 for smollm2-135m, "
        "measured on 2 CPU cores)",
    )
    add(
        "--link-gbps",
        type=float,
        metavar="G",
        help="device to host memory, 10^9 bytes/s each way (default: 50, or 12; "
        "`python -m smg_sglang doctor` measures yours)",
    )
    add(
        "--itl-ms",
        type=float,
        metavar="MS",
        help="between two tokens of an answer (default: 20, or 60)",
    )
