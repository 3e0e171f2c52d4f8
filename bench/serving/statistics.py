"""Figures from raw times, with how sure they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.serving.client import Answer

RESAMPLES = 4000


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, median, tail and quartiles."""
    if not values:
        return {}
    q25, p50, q75, p99 = np.percentile(values, [25, 50, 75, 99])
    return {
        "mean": float(np.mean(values)),
        "p50": float(p50),
        "p99": float(p99),
        "q25": float(q25),
        "q75": float(q75),
        "n": len(values),
    }


def compare(
    ours: Sequence[float], theirs: Sequence[float], seed: int = 0
) -> dict[str, float | int]:
    """Ours over theirs, from repeats that were taken in turn.

    `ratio`: the median of the ratios within pairs, with a 95% bootstrap interval. What else the box
    does meets both of a pair, so it is steadier than `of_medians`, the ratio of the two medians.
    """
    a, b = np.asarray(ours, float), np.asarray(theirs, float)
    if a.shape != b.shape or not a.size:
        raise ValueError(f"{a.size} repeats of one and {b.size} of the other make no pairs")
    ratios = a / b
    picks = np.random.default_rng(seed).integers(0, a.size, (RESAMPLES, a.size))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
    return {
        "ratio": float(np.median(ratios)),
        "low": float(low),
        "high": float(high),
        "of_medians": float(np.median(a) / np.median(b)),
        "pairs": int(a.size),
    }


def times_faster(slow: Sequence[float], fast: Sequence[float], seed: int = 0) -> dict[str, float]:
    """median(slow) / median(fast) of unpaired times, with a 95% bootstrap interval."""
    rng = np.random.default_rng(seed)
    a, b = np.asarray(slow, float), np.asarray(fast, float)
    medians = [np.median(x[rng.integers(0, x.size, (RESAMPLES, x.size))], axis=1) for x in (a, b)]
    low, high = np.percentile(medians[0] / medians[1], [2.5, 97.5])
    return {"ratio": float(np.median(a) / np.median(b)), "low": float(low), "high": float(high)}


def summarise(answers: Sequence[Answer], seconds: float, infinite: Sequence[int]) -> dict[str, Any]:
    """One run of a workload. Times in seconds, throughput in tokens a second."""
    prompt = sum(answer.prompt_tokens for answer in answers)
    output = sum(len(answer.token_s) for answer in answers)
    hits: dict[str, int] = {}
    for answer in answers:
        for tier, tokens in answer.cached.items():
            if isinstance(tokens, int):
                hits[tier] = hits.get(tier, 0) + tokens
    ideal = sum(infinite)
    return {
        "requests": len(answers),
        "seconds": seconds,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "ttft_s": spread([answer.ttft_s for answer in answers]),
        "itl_s": spread([gap for answer in answers for gap in answer.gaps_s]),
        "tokens_per_s": (prompt + output) / seconds,
        "output_tokens_per_s": output / seconds,
        "hit_share": {tier: tokens / prompt for tier, tokens in hits.items()},
        "infinite_hit_share": ideal / prompt,
        "of_infinite": sum(hits.values()) / ideal if ideal else None,
    }
