"""A run for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from smg_sglang.simulate.run import Outcome
from smg_sglang.simulate.sweep import Sweep


def run_table(run: Outcome, title: str) -> Table:
    """One run, figure by figure."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    for row in _rows(run):
        table.add_row(*row)
    return table


def _rows(run: Outcome) -> list[tuple[str, str, str]]:
    saved, share = run.saved_prefill_s, run.hit_share
    rows = [
        ("requests", f"{run.requests:,}", f"{run.input_tokens:,} prompt tokens"),
        *(
            (f"hits, {tier}", f"{share[tier]:.2%}", f"{run.hit_tokens[tier]:,} tokens")
            for tier in run.hit_tokens
        ),
        ("hits, all", f"{share['total']:.2%}", "of prompt tokens"),
        ("prefill work saved", f"{run.saved_flops_share['total']:.2%}", "of its FLOPs"),
        ("loads", f"{run.loads:,}", f"{_gib(run.loaded_bytes)}, {run.load_s:,.1f} s of the link"),
        ("spills", f"{run.spills:,}", f"{_gib(run.spilled_bytes)}, {run.spill_s:,.1f} s of it"),
        ("evicted, device", f"{run.evicted_tokens['device']:,}", "tokens"),
        ("evicted, host", f"{run.evicted_tokens['host']:,}", "tokens"),
        ("evicted, storage", f"{run.evicted_tokens['storage']:,}", "tokens"),
        (
            "TTFT saved, a request",
            f"{_per(saved['total'], run.requests)} ms",
            f"device {_per(saved['device'], run.requests)} ms, "
            f"host {_per(saved['host'], run.requests)} ms, "
            f"storage {_per(saved['storage'], run.requests)} ms, on an idle device",
        ),
        (
            "TTFT with queueing",
            f"{run.ttft_s['mean']:,.2f} s",
            f"p50 {run.ttft_s['p50']:,.2f} s, p99 {run.ttft_s['p99']:,.2f} s",
        ),
        ("took", f"{run.took_s:.1f} s", f"for {run.simulated_s:,.0f} s"),
    ]
    for reason, tokens in run.dropped_tokens.items():
        rows.append((f"not spilled, {reason}", f"{tokens:,}", "tokens"))
    if run.refused_requests:
        told = f"{run.refused_tokens:,} prompt tokens, longer than the device's pool; not counted"
        rows.append(("refused", f"{run.refused_requests:,}", told))
    return rows


def sweep_table(sweep: Sweep, title: str) -> Table:
    """A row for each run; narrow enough for 80 columns."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("policy")
    columns = ("host\nGiB", "device", "host", "hits", "of in-\nfinite", "optimum", "work\nsaved")
    for column in (*columns, "TTFT\nsaved ms"):
        table.add_column(column, justify="right")
    for run in sweep.runs:
        share = run.hit_share
        shares = (
            share["device"],
            share["host"],
            share["total"],
            share["total"] / (sweep.bounds.infinite or 1),
            sweep.bounds.belady[run.host_gb],
            run.saved_flops_share["total"],
        )
        saved = f"{1000 * run.saved_prefill_s['total'] / max(run.requests, 1):,.0f}"
        table.add_row(run.policy, f"{run.host_gb:g}", *(f"{x:.1%}" for x in shares), saved)
    return table


def refused(sweep: Sweep) -> str | None:
    """What a sweep does not count, as a line under its table; None where it counts all."""
    if not sweep.refused_requests:
        return None
    return (
        f"{sweep.refused_requests:,} of {sweep.requests:,} requests, {sweep.refused_tokens:,} "
        "prompt tokens, are longer than the device's pool and not counted"
    )


def block_table(rows: Sequence[tuple[int, dict[str, float]]], infinite: float, title: str) -> Table:
    """Hit shares of single levels, a row for each size."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("blocks", justify="right")
    for name in rows[0][1]:
        table.add_column(name, justify="right")
    for blocks, shares in rows:
        table.add_row(f"{blocks:,}", *(f"{share:.3f}" for share in shares.values()))
    table.add_row("infinite", *(f"{infinite:.3f}" for _ in rows[0][1]))
    return table


def _gib(size: int) -> str:
    return f"{size / (1 << 30):,.1f} GiB"


def _per(seconds: float, requests: int) -> str:
    return f"{1000 * seconds / max(requests, 1):,.1f}"
