"""One program's runs as a table, and what is to be thought of its outputs."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.serving.report import NAMES

Result = dict[str, Any]


def print_result(console: Console, name: str, result: Result) -> None:
    table = Table(title=name.replace("_", " "), title_justify="left", title_style="bold")
    heads = (
        "seconds median",
        "quartiles",
        "TTFT ms",
        "requests",
        "prompt tokens",
        "device",
        "host",
    )
    table.add_column("")
    for head in heads:
        table.add_column(head, justify="right")
    for subject, row in result["subjects"].items():
        table.add_row(NAMES[subject], *_cells(row))
    console.print(table)
    ratio = result["seconds_ratio"]
    console.print(
        f"time, SMG / stock, in pairs: {ratio['ratio']:.2f} "
        f"[{ratio['low']:.2f}, {ratio['high']:.2f}] of {ratio['pairs']}"
    )
    for line in said(result):
        console.print(line)


def _cells(row: Result) -> list[str]:
    seconds, ttft = row["seconds"], row.get("ttft_s")
    return [
        f"{seconds['p50']:.1f}",
        f"{seconds['q25']:.1f}..{seconds['q75']:.1f}",
        f"{ttft['p50'] * 1e3:,.0f}" if ttft else "-",
        f"{row['requests']['p50']:.0f}",
        f"{row['prompt_tokens']['p50']:,.0f}",
        f"{row['device']['p50']:.1%}",
        f"{row['host']['p50']:.1%}",
    ]


def said(result: Result) -> list[str]:
    """Whether the outputs are equal, with the first difference."""
    ours, stock = result["ours_against_stock"], result["stock_against_itself"]
    lines = [
        f"outputs of SMG that are not stock's: {ours['different']} of {ours['compared']}",
        f"stock again, against itself: {stock['different']} of {stock['compared']}",
    ]
    if ours["different"]:
        a, b = ours["example"]
        lines.append(f"first difference: stock {escape(repr(a))}, SMG {escape(repr(b))}")
    if ours["different"] and stock["different"]:
        lines.append("stock is not equal to itself either: batches change the last bits of sums")
    return lines
