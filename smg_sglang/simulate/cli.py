"""`python -m smg_sglang simulate TRACE`: what the server would do with a trace."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from smg_sglang.config import DEFAULT_EVICTION, EvictionName
from smg_sglang.errors import ConfigError, SmgError
from smg_sglang.simulate import bounds
from smg_sglang.simulate import options as types
from smg_sglang.simulate.model import MODELS, model_cost
from smg_sglang.simulate.plot import plot_sweep
from smg_sglang.simulate.report import block_table, refused, run_table, sweep_table
from smg_sglang.simulate.run import simulate
from smg_sglang.simulate.settings import Settings
from smg_sglang.simulate.sweep import Sweep, run_sweep, write_csv
from smg_sglang.trace import Request, TraceFormat, load_trace

#: Measured with `make bench` on 2 cores of an AMD EPYC. For others the defaults of `Settings`: an
#: estimate for an H100 with PCIe 5.
_RATES = {"smollm2-135m": {"tflops": 0.14, "link_gbps": 12.0, "itl_ms": 60.0}}


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 2 for a wrong choice or a bad trace, in one sentence."""
    try:
        _run(_parse(arguments), Console())
    except (SmgError, OSError) as error:
        print(f"smg_sglang simulate: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    options = _parser().parse_args(arguments)
    if options.json is not None:
        # Now, not after minutes of work.
        _check_writable(options.json)
    if options.sweep is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    return options


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise ConfigError(f"--json {path} is a folder: name a file in it.")
    if not path.parent.is_dir():
        raise ConfigError(f"--json {path}: there is no folder {path.parent}; create it.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"--json {path} cannot be written: choose another path.")


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
    if options.blocks is not None:
        result: Any = _blocks(requests, policies, options.blocks, title, console)
    elif options.sweep is not None or len(policies) > 1:
        result = _sweep(options, requests, policies, title, console)
    else:
        settings = _settings(options, policies[0])
        with _progress(len(requests)) as tell:
            result = simulate(requests, settings, lambda done: tell("requests", done))
        console.print(run_table(result, title))
    if options.json is not None:
        data = msgspec.json.format(msgspec.json.encode(result))
        options.json.write_bytes(data + b"\n")
    if isinstance(result, Sweep) and options.sweep is not None:
        _draw(result, title, _stem(options, title).with_suffix(".png"), console)


def _sweep(
    options: argparse.Namespace,
    requests: list[Request],
    policies: list[EvictionName],
    title: str,
    console: Console,
) -> Sweep:
    sizes = options.sweep if options.sweep is not None else [options.host_gb or 0.0]
    with _progress(len(requests)) as tell:
        settings = _settings(options, policies[0])
        result = run_sweep(requests, settings, policies, sizes or None, tell)
    console.print(sweep_table(result, title))
    if told := refused(result):
        console.print(told, soft_wrap=True)
    if options.sweep is not None:
        path = _stem(options, title).with_suffix(".csv")
        write_csv(result, path)
        console.print(f"written: {path}", soft_wrap=True)
    return result


def _stem(options: argparse.Namespace, title: str) -> Path:
    out: Path = options.out
    return out / f"{title.split('.', maxsplit=1)[0]}_sweep"


def _draw(sweep: Sweep, title: str, path: Path, console: Console) -> None:
    """Last, when the figures are safe: the picture is the least of them."""
    try:
        plot_sweep(sweep, title, path)
    except ConfigError as error:
        print(f"smg_sglang simulate: warning: {error}", file=sys.stderr)
    else:
        console.print(f"written: {path}", soft_wrap=True)


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
    if not total:
        raise ConfigError("--blocks: the trace refers to no block.")
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
    if options.device_tokens is None:
        raise ConfigError("--device-tokens is needed: the server's --max-total-tokens.")
    given = {name: getattr(options, name) for name in Settings.flags()}
    given = {name: value for name, value in given.items() if value is not None}
    chosen = _RATES.get(options.model, {}) | given
    return _checked(Settings(model, eviction=policy, closed=options.closed, **chosen))


def _checked(settings: Settings) -> Settings:
    if settings.device_pages < 2:
        raise ConfigError("--device-tokens must be two pages at least.")
    if settings.storage_gb and not settings.host_bytes:
        raise ConfigError("--storage-gb needs host memory above it: give --host-gb.")
    if settings.chunk_tokens < settings.page_size:
        raise ConfigError("--chunk-tokens must be a page at least.")
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


class _Parser(argparse.ArgumentParser):
    """Says what is wrong as all else here does: in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m smg_sglang simulate",
        description="Replay a trace through the server's own trees and books, without a model: "
        "hits by tier, loads, spills, prefill time saved. See docs/simulator.md.",
    )
    add = parser.add_argument
    add("trace", help="Mooncake, Qwen-Bailian or token JSONL (.gz), agent sessions (.tgz, folder)")
    _add_trace(add)
    _add_server(add)
    add(
        "--sweep",
        type=types.gibs,
        nargs="?",
        const=[],
        metavar="GIB,...",
        help="a run for each size of host memory (default: from none to all that the trace "
        "fills), written as CSV and PNG, with an infinite cache and Belady's optimum",
    )
    add(
        "--blocks",
        type=types.counts,
        metavar="N,...",
        help="instead of a server: one level of N blocks of the trace, hits as a share of "
        "references to blocks, as in published analyses",
    )
    add("--out", type=Path, default=Path(), metavar="DIR", help="for the sweep's files")
    add("--json", type=Path, metavar="PATH", help="write every figure")
    return parser


def _add_trace(add: Callable[..., Any]) -> None:
    add("--format", choices=[f.value for f in TraceFormat], help="(default: told by its fields)")
    add("--limit", type=types.count, metavar="N", help="only the first N requests")
    add("--scale-to", type=types.count, metavar="TOKENS", help="map each block to so many tokens")
    add(
        "--block-tokens",
        type=types.count,
        metavar="TOKENS",
        help="tokens a block, if not the usual",
    )
    add(
        "--session-gap",
        type=types.from_0,
        default=0.0,
        metavar="S",
        help="seconds between the beginnings of agent sessions (default: all at once)",
    )
    add("--closed", action="store_true", help="one request after another; no timestamps")


def _add_server(add: Callable[..., Any]) -> None:
    """All but its policy, of which there may be several, has None where it is not given."""
    for name, told in Settings.flags().items():
        add(f"--{name.replace('_', '-')}", **told)
    add(
        "--policy",
        default=DEFAULT_EVICTION.value,
        metavar="NAME,...",
        help=f"eviction in host memory: {', '.join(EvictionName)}; several or `all` are compared "
        "(default: %(default)s)",
    )
    add(
        "--model",
        default="llama-3.1-8b",
        metavar="NAME",
        help=f"{', '.join(MODELS)}, or a config.json (default: %(default)s)",
    )
