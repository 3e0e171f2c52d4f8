"""What came of a replay, for JSON, tables and the suite's records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.replay.asks import Ask
from bench.replay.run import Outcome
from bench.serving.statistics import spread, summarise
from bench.serving.subjects import SMG, STOCK

Result = dict[str, Any]
TIERS = ("device", "host", "storage")


def summary(outcomes: Sequence[Outcome], seconds: float, infinite: Sequence[int]) -> Result:
    """Figures of one server. Failed requests are counted, and in no other figure."""
    done = [
        (outcome, hits)
        for outcome, hits in zip(outcomes, infinite, strict=True)
        if outcome.answer is not None
    ]
    failed = [outcome for outcome in outcomes if outcome.answer is None]
    answers = [outcome.answer for outcome, _ in done]
    if not answers:
        raise RuntimeError(f"no request of {len(outcomes)} was answered: {failed[0].error}")
    planned = sum(len(outcome.ask.prompt) for outcome, _ in done)
    return {
        **summarise(answers, seconds, [hits for _, hits in done]),
        "failed": len(failed),
        "errors": sorted({outcome.error for outcome in failed})[:5],
        "late_s": spread([outcome.late_s for outcome in outcomes]),
        # Other than 0 where a tokenizer did not see the words as they were meant.
        "prompt_tokens_unplanned": sum(answer.prompt_tokens for answer in answers) - planned,
        "requests_raw": [_raw(outcome) for outcome in outcomes],
    }


def _raw(outcome: Outcome) -> Result:
    row: Result = {"number": outcome.ask.number, "at_s": round(outcome.ask.at_s, 4)}
    if outcome.answer is None:
        return {**row, "error": outcome.error}
    answer = outcome.answer
    return {
        **row,
        "prompt_tokens": answer.prompt_tokens,
        "ttft_s": round(answer.ttft_s, 6),
        "tokens": len(answer.token_s),
        "cached": answer.cached,
    }


def described(asks: Sequence[Ask], infinite: Sequence[int], dropped: int = 0) -> Result:
    """The trace as it is sent; `dropped` requests of it are not."""
    prompts = sum(len(ask.prompt) for ask in asks)
    return {
        "requests": len(asks),
        "dropped": dropped,
        "seconds": asks[-1].at_s,
        "prompt_tokens": prompts,
        "longest_prompt": max(len(ask.prompt) for ask in asks),
        "output_tokens": sum(ask.answer_tokens for ask in asks),
        "infinite_hit_share": sum(infinite) / prompts,
    }


def print_table(console: Console, title: str, subjects: Mapping[str, Result]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for head in ("TTFT ms mean", "p50", "p99", "ITL ms p50", "p99", "tok/s", *TIERS[:2]):
        table.add_column(head, justify="right")
    for head in ("of infinite", "failed", "late ms p99"):
        table.add_column(head, justify="right")
    for name, row in subjects.items():
        table.add_row(name, *_cells(row))
    console.print(table)


def _cells(row: Result) -> list[str]:
    ttft, itl, hits = row["ttft_s"], row["itl_s"], row["hit_share"]
    of = row["of_infinite"]
    return [
        *(f"{ttft[key] * 1e3:,.0f}" for key in ("mean", "p50", "p99")),
        *(f"{itl[key] * 1e3:,.1f}" if itl else "-" for key in ("p50", "p99")),
        f"{row['tokens_per_s']:,.0f}",
        *(f"{hits.get(tier, 0):.1%}" for tier in TIERS[:2]),
        "-" if of is None else f"{of:.1%}",
        str(row["failed"]),
        f"{row['late_s']['p99'] * 1e3:.0f}",
    ]


def figures(title: str, subjects: Mapping[str, Result]) -> list[Result]:
    """As `bench/suite` records them, None for what was not measured; nothing where stock or ours
    was not asked."""
    if not {STOCK, SMG} <= subjects.keys():
        return []
    stock, ours = subjects[STOCK], subjects[SMG]

    def row(what: str, unit: str, values: Sequence[float | None]) -> Result:
        a, b = values
        return {"workload": title, "what": what, "unit": unit, "baseline": a, "ours": b}

    both = (stock, ours)
    return [
        row("TTFT mean", "s", [r["ttft_s"]["mean"] for r in both]),
        row("TTFT p50", "s", [r["ttft_s"]["p50"] for r in both]),
        row("TTFT p99", "s", [r["ttft_s"]["p99"] for r in both]),
        row("prompt + output tokens a second", "tok/s", [r["tokens_per_s"] for r in both]),
        row("ITL p50", "ms", [_ms(r["itl_s"].get("p50")) for r in both]),
        row("hits on the device", "share", [r["hit_share"].get("device", 0) for r in both]),
        row("hits in host memory", "share", [r["hit_share"].get("host", 0) for r in both]),
        row("hits, of an infinite cache's", "share", [r["of_infinite"] for r in both]),
        row("requests that failed", "n", [r["failed"] for r in both]),
    ]


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3
