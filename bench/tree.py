"""How fast the books are: our RadixTree next to SGLang's two, on the same prompts.

    python bench/tree.py [--help]

In one process, the trees take turns on every prompt; figures are medians with quartiles.
SGLang's trees are driven below their cache classes, so they pay for the tree alone. A match in
ours returns the page numbers; in SGLang's that is a second call, shown as an operation of its own.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import platform
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tree_subjects import Ours, SglangPython, SglangRust, Subject

from smg_sglang.tree.page_keys import page_keys

PROMPT = 10_000
SHARED = 6_000
FAN_OUT = 8
"""Prompts of PROMPT tokens; FAN_OUT of them at a time share their first SHARED tokens."""
VOCABULARY = 128_000
CHUNK = 2_048
"""Long prompts enter the trees chunk by chunk, as chunked prefill does it."""

Samples = dict[tuple[str, ...], list[float]]


def timed(samples: list[float], call: Callable[..., Any], *arguments: Any) -> Any:
    start = time.perf_counter()
    result = call(*arguments)
    samples.append((time.perf_counter() - start) * 1e6)
    return result


def turns(subjects: list[Subject], rounds: int) -> Iterator[list[Subject]]:
    """All subjects in each round, each time another one first."""
    for i in range(rounds):
        yield subjects[i % len(subjects) :] + subjects[: i % len(subjects)]


def bench_prompts(page_size: int, pages: int, rounds: int, random: np.random.Generator) -> Samples:
    """Match and insert prompts whose first part is known, in a tree of so many pages."""
    subjects: list[Subject] = [
        Ours(page_size),
        Ours(page_size, with_keys=True),
        SglangRust(page_size),
        SglangPython(page_size),
    ]
    own = PROMPT - SHARED
    groups = max(pages * page_size // (SHARED + FAN_OUT * own), 1)
    heads = [random.integers(0, VOCABULARY, SHARED) for _ in range(groups)]
    for head in heads:
        for _ in range(FAN_OUT):
            tokens = np.concatenate([head, random.integers(0, VOCABULARY, own)])
            for subject in subjects:
                subject.insert(subject.prepare(tokens))
    samples: Samples = defaultdict(list)
    # The younger half of the groups in turns, so that none of them is evicted by the rounds.
    recent = itertools.cycle(heads[groups // 2 :])
    for order, head in zip(turns(subjects, rounds), recent, strict=False):
        tokens = np.concatenate([head, random.integers(0, VOCABULARY, own)])
        for subject in order:
            one_prompt(subject, tokens, page_size, samples)
    return samples


def one_prompt(subject: Subject, tokens: np.ndarray, page_size: int, samples: Samples) -> None:
    def spent(operation: str) -> list[float]:
        return samples[str(page_size), operation, subject.name]

    first, again = subject.prepare(tokens), subject.prepare(tokens)
    found = timed(spent("match, 6,000 known"), subject.match, first)
    assert found == SHARED // page_size * page_size, (subject.name, found)
    timed(spent("insert 4,000 new"), subject.insert, first)
    found = timed(spent("match, all known"), subject.match, again)
    assert found == PROMPT // page_size * page_size, (subject.name, found)
    if not isinstance(subject, Ours):
        timed(spent("page numbers of a match"), subject.pages, again)
    new = found - SHARED // page_size * page_size
    freed = timed(spent("evict 4,000"), subject.evict, new)
    assert freed >= new, (subject.name, freed)


def bench_long(page_size: int, rounds: int, random: np.random.Generator) -> Samples:
    """Match a prompt of 100,000 tokens that came chunk by chunk; and hash its pages."""
    subjects: list[Subject] = [Ours(page_size), SglangRust(page_size), SglangPython(page_size)]
    tokens = random.integers(0, VOCABULARY, 100_000)
    for subject in subjects:
        for end in [*range(CHUNK, len(tokens), CHUNK), len(tokens)]:
            subject.insert(subject.prepare(tokens[:end]))
    prompts = {subject.name: subject.prepare(tokens) for subject in subjects}
    samples: Samples = defaultdict(list)
    for order in turns(subjects, rounds):
        for subject in order:
            prompt = prompts[subject.name]
            timed(samples[str(page_size), "match 100,000", subject.name], subject.match, prompt)
            if not isinstance(subject, Ours):
                case = str(page_size), "page numbers of 100,000"
                timed(samples[*case, subject.name], subject.pages, prompt)
    return samples


def bench_keys(page_size: int, rounds: int, random: np.random.Generator) -> Samples:
    """Hash the pages of a prompt, next to the sha256 chain of SGLang (native code)."""
    from sglang.srt.mem_cache.utils import get_hash_str

    samples: Samples = defaultdict(list)
    get_hash_str(array("q", range(64)), None, 64)  # loads its extension
    tokens = array("q", random.integers(0, VOCABULARY, PROMPT).tobytes())
    for _ in range(rounds):
        case = str(page_size), "page keys of 10,000"
        timed(samples[*case, "page_keys"], page_keys, tokens, page_size)
        timed(samples[*case, "SGLang sha256"], get_hash_str, tokens, None, page_size)
    return samples


def bench_eviction(
    leaves: int, rounds: int, subjects: list[Subject], random: np.random.Generator
) -> Samples:
    """Take one leaf of 8 pages out of so many, with a use and an insertion in between; and, the
    worst for a lazy queue, the one time after all of them were used."""
    prompts = [random.integers(0, VOCABULARY, 8) for _ in range(leaves)]
    for tokens in prompts:
        for subject in subjects:
            subject.insert(subject.prepare(tokens))
    samples: Samples = defaultdict(list)
    for subject in subjects:
        subject.evict(8)
        for tokens in random.permutation(prompts):
            subject.use(subject.prepare(tokens))
        timed(samples[str(leaves), "evict, all used", subject.name], subject.evict, 8)
    for order in turns(subjects, rounds):
        used, new = prompts[random.integers(leaves)], random.integers(0, VOCABULARY, 8)
        for subject in order:
            subject.insert(subject.prepare(used))
            subject.insert(subject.prepare(new))
            timed(samples[str(leaves), "evict 1 leaf", subject.name], subject.evict, 8)
    return samples


def rows(samples: Samples) -> list[dict[str, Any]]:
    found = []
    for (size, operation, subject), times in samples.items():
        low, median, high = np.percentile(times, [25, 50, 75])
        figures = {"median_us": median, "q1_us": low, "q3_us": high, "max_us": max(times)}
        found.append(
            {"size": int(size), "operation": operation, "subject": subject, "samples": len(times)}
            | {name: round(float(value), 2) for name, value in figures.items()}
        )
    return sorted(found, key=lambda row: (row["operation"], row["size"]))


def show(title: str, size: str, results: list[dict[str, Any]]) -> None:
    table = Table("operation", size, "tree", title=title)
    for heading in ("median µs", "quartiles", "max"):
        table.add_column(heading, justify="right")
    for last, row in zip([None, *results], results, strict=False):
        same = last and (last["operation"], last["size"]) == (row["operation"], row["size"])
        if last and not same:
            table.add_section()
        case = ("", "") if same else (row["operation"], f"{row['size']:,}")
        spread = f"{row['q1_us']:,.1f} - {row['q3_us']:,.1f}"
        figures = (f"{row['median_us']:,.1f}", spread, f"{row['max_us']:,.0f}")
        table.add_row(*case, row["subject"], *figures)
    Console(width=max(Console().width, 100)).print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--page-sizes", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--pages", type=int, default=100_000, help="in the tree (100,000)")
    parser.add_argument("--rounds", type=int, default=60, help="samples per figure (60)")
    parser.add_argument(
        "--leaves", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="for eviction"
    )
    parser.add_argument("--seed", type=int, default=0)
    default = Path(__file__).parent / "out" / "tree.json"
    parser.add_argument("--out", type=Path, default=default, help="JSON (bench/out/tree.json)")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    random = np.random.default_rng(args.seed)
    gc.disable()
    prompts: Samples = {}
    for page_size in args.page_sizes:
        prompts |= bench_prompts(page_size, args.pages, args.rounds, random)
        prompts |= bench_long(page_size, args.rounds, random)
        prompts |= bench_keys(page_size, args.rounds, random)
        gc.collect()
    eviction: Samples = {}
    for leaves in args.leaves:
        subjects: list[Subject] = [Ours(1), SglangRust(1), SglangPython(1)]
        eviction |= bench_eviction(leaves, args.rounds, subjects, random)
    results = {"prompts": rows(prompts), "eviction": rows(eviction)}
    show(f"Prompts of {PROMPT:,} tokens, {args.pages:,} pages", "page size", results["prompts"])
    show("Eviction", "leaves", results["eviction"])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    setting = {"machine": platform.processor() or platform.machine(), "cpus": os.cpu_count()}
    options = {key: value for key, value in vars(args).items() if key != "out"}
    args.out.write_text(json.dumps(setting | {"options": options} | results, indent=1))


if __name__ == "__main__":
    main()
