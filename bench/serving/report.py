"""The results for people: tables, and what was promised beside what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.serving.subjects import SMG, STOCK

Result = dict[str, Any]
NAMES = {STOCK: "stock SGLang", SMG: "SMG", "hicache": "HiCache"}

#: How much sooner the first token of chats and documents is to come than stock's.
TIMES_SOONER = 4

MARKS = {True: "[green]holds[/]", False: "[red]missed[/]", None: "[yellow]cannot tell[/]"}


@dataclass(frozen=True)
class Verdict:
    """A promise and its measurement; `holds` is None where the run cannot tell: its spread is too
    wide, or it is too short for what was promised."""

    what: str
    target: str
    measured: str
    holds: bool | None


def print_phase(console: Console, name: str, result: Result) -> None:
    """One phase as a table."""
    tables = {"prefix": _prefix_table, "no_reuse": _no_reuse_table}
    console.print(tables.get(name, _workload_table)(result))


def _table(result: Result, *columns: str) -> Table:
    table = Table(title=result["title"], title_justify="left", title_style="bold")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:,.1f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _workload_table(result: Result) -> Table:
    table = _table(
        result,
        *("TTFT ms mean", "p50", "p99", "ITL ms mean", "p50", "p99"),
        *("tok/s", "hit device", "host", "of infinite"),
    )
    for subject, row in result["subjects"].items():
        ttft, itl, hits = row["ttft_s"], row["itl_s"], row["hit_share"]
        table.add_row(
            NAMES[subject],
            *(_ms(ttft.get(key)) for key in ("mean", "p50", "p99")),
            *(_ms(itl.get(key)) for key in ("mean", "p50", "p99")),
            f"{row['tokens_per_s']:,.0f}",
            _percent(hits.get("device", 0)),
            _percent(hits.get("host", 0)),
            _percent(row["of_infinite"]),
        )
    return table


def _no_reuse_table(result: Result) -> Table:
    table = _table(result, "tok/s median", "quartiles", "ITL ms median", "quartiles", "TTFT ms")
    for subject, row in result["subjects"].items():
        rate, itl = row["tokens_per_s"], row["itl_s"]
        table.add_row(
            NAMES[subject],
            f"{rate['p50']:,.1f}",
            f"{rate['q25']:,.0f}..{rate['q75']:,.0f}",
            _ms(itl["p50"]),
            f"{_ms(itl['q25'])}..{_ms(itl['q75'])}",
            _ms(row["ttft_s"]["p50"]),
        )
    for subject, ratios in result["ratios"].items():
        cells = [f"{_interval(ratios[key])}" for key in ("tokens_per_s", "itl_s", "ttft_s")]
        table.add_row(f"{NAMES[subject]} / stock, pairs", cells[0], "", cells[1], "", cells[2])
    return table


def _interval(ratio: dict[str, float]) -> str:
    return f"{ratio['ratio']:.4f} [{ratio['low']:.4f}, {ratio['high']:.4f}]"


def _prefix_table(result: Result) -> Table:
    table = _table(result, "TTFT ms median", "quartiles", "p99", "asks", "cold / this")
    for subject, row in result["subjects"].items():
        for tier in ("cold", "device", "host", "mixed"):
            if not (figures := row.get(tier)):
                continue
            table.add_row(
                f"{NAMES[subject]}: {tier}",
                _ms(figures["p50"]),
                f"{_ms(figures['q25'])}..{_ms(figures['q75'])}",
                _ms(figures["p99"]),
                str(figures["n"]),
                f"{row['cold']['p50'] / figures['p50']:.1f}",
            )
    return table


def verdicts(phases: dict[str, Result]) -> list[Verdict]:
    """Each promise that this run can judge."""
    found: list[Verdict] = []
    prefix = phases.get("prefix", {}).get("subjects", {}).get(SMG, {})
    if "cold_over_host" in prefix:
        times = prefix["cold_over_host"]
        found.append(
            Verdict(
                "TTFT, prefix in host memory",
                "<= 1/15 of cold",
                f"1/{times['ratio']:.1f} [1/{times['low']:.1f}, 1/{times['high']:.1f}]",
                at_least(15, times),
            )
        )
    for name in ("chats", "documents"):
        found += _reuse_verdicts(name, phases.get(name, {}).get("subjects", {}))
    ratios = phases.get("no_reuse", {}).get("ratios", {}).get(SMG)
    if ratios:
        found += [
            _within_one_percent("throughput", ratios["tokens_per_s"], better_above=True),
            _within_one_percent("inter-token latency", ratios["itl_s"], better_above=False),
        ]
    return found


def at_least(bound: float, ratio: dict[str, float]) -> bool | None:
    """Whether the whole interval is above the bound; None where the bound is inside it."""
    if ratio["low"] >= bound:
        return True
    return False if ratio["high"] < bound else None


def _within_one_percent(what: str, ratio: dict[str, float], *, better_above: bool) -> Verdict:
    """Never worse than stock by more than 1%; better is no miss."""
    low, high = ratio["low"] - 1, ratio["high"] - 1
    loss = {"low": -high, "high": -low} if not better_above else {"low": low, "high": high}
    return Verdict(
        f"no reuse: {what}",
        "within 1% of stock",
        f"{ratio['ratio'] - 1:+.2%} [{low:+.2%}, {high:+.2%}]; medians "
        f"{ratio['of_medians'] - 1:+.2%}",
        at_least(-0.01, loss),
    )


def _reuse_verdicts(name: str, subjects: dict[str, Result]) -> list[Verdict]:
    if not {STOCK, SMG} <= subjects.keys():
        return []
    ours, stock = subjects[SMG], subjects[STOCK]
    return [
        _sooner(name, stock["ttft_s"]["mean"] / ours["ttft_s"]["mean"], ours["infinite_hit_share"]),
        Verdict(
            f"{name}: hits of an infinite cache",
            ">= 95%",
            f"{ours['of_infinite']:.1%} (stock {stock['of_infinite']:.1%})",
            ours["of_infinite"] >= 0.95,
        ),
    ]


def _sooner(name: str, times: float, findable: float) -> Verdict:
    """No verdict where too few prompt tokens can be found at all: with 3 turns instead of 8, more
    than a quarter of them is new to any cache."""
    new, holds, measured = 1 - findable, times >= TIMES_SOONER, f"1/{times:.2f}"
    possible = new <= 1 / TIMES_SOONER
    if not (holds or possible):
        measured += f"; {new:.0%} of the prompt tokens are new to any cache"
    target = f"<= 1/{TIMES_SOONER} of stock"
    return Verdict(f"{name}: mean TTFT", target, measured, holds if holds or possible else None)


def print_verdicts(console: Console, found: list[Verdict]) -> None:
    """Promises as a table."""
    table = Table(title="What must hold", title_justify="left", title_style="bold")
    for column in ("", "target", "measured", ""):
        table.add_column(column)
    for verdict in found:
        table.add_row(verdict.what, verdict.target, verdict.measured, MARKS[verdict.holds])
    console.print(table)
