"""The runs: what is asked of which server when, and what comes of it."""

from __future__ import annotations

import asyncio
import os
import random
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from bench.serving import workloads
from bench.serving.client import Answer, Client, run_workload
from bench.serving.statistics import compare, spread, summarise, times_faster
from bench.serving.subjects import PAGE_SIZE, STOCK
from bench.serving.workloads import Workload
from tools.sglang_server import SglangServer

Servers = Mapping[str, SglangServer]
Advance = Callable[[], Any]
Result = dict[str, Any]

PHASES = ("prefix", "no_reuse", "chats", "documents")
WORKING_SET = 4
"""Working set over device pool."""
PREFIX_TOKENS, QUESTION_TOKENS = 2000, 16


class Phase:
    """One part of the benchmark; `steps` is how often `run` calls `advance`."""

    name: str
    title: str

    def steps(self, servers: Servers) -> int:
        raise NotImplementedError

    def run(self, servers: Servers, advance: Advance) -> Result:
        raise NotImplementedError


class OneAfterTheOther(Phase):
    """A workload on each server, from empty caches."""

    def __init__(self, workload: Workload) -> None:
        self.name, self.title, self.workload = workload.name, workload.title, workload

    def steps(self, servers: Servers) -> int:
        return len(servers) * len(self.workload.turns)

    def run(self, servers: Servers, advance: Advance) -> Result:
        infinite = self.workload.infinite_hits(PAGE_SIZE)
        subjects = {}
        for subject, server in servers.items():
            server.flush()
            answers, seconds = asyncio.run(run_workload(server.url, self.workload, advance))
            subjects[subject] = {
                **summarise(answers, seconds, infinite),
                "load_average": os.getloadavg()[0],
                "answers": [_raw(answer) for answer in answers],
            }
        return {"title": self.title, "subjects": subjects}


class TakingTurns(Phase):
    """Repeats of a workload without reuse, servers in the order A B, B A, A B, ...

    shape: sizes that `workloads.no_reuse` takes, instead of its own.
    """

    def __init__(self, repeats: int, **shape: int) -> None:
        self._repeats, self._shape = repeats, shape
        self.name = "no_reuse"
        self.title = f"{workloads.no_reuse(**shape).title}, {repeats} times"

    def steps(self, servers: Servers) -> int:
        return (self._repeats + 1) * len(servers)

    def run(self, servers: Servers, advance: Advance) -> Result:
        rows: dict[str, list[Result]] = {subject: [] for subject in servers}
        for repeat in range(-1, self._repeats):
            workload = workloads.no_reuse(seed=1000 + repeat, **self._shape)
            for subject in list(servers)[:: 1 if repeat % 2 else -1]:
                row = self._once(servers[subject], workload)
                if repeat >= 0:  # the first ones only warm up
                    rows[subject].append(row)
                advance()
        subjects = {subject: self._medians(repeats) for subject, repeats in rows.items()}
        return {"title": self.title, "subjects": subjects, "ratios": self._ratios(rows)}

    @staticmethod
    def _once(server: SglangServer, workload: Workload) -> Result:
        answers, seconds = asyncio.run(run_workload(server.url, workload))
        summary = summarise(answers, seconds, [0])
        return {
            "tokens_per_s": summary["tokens_per_s"],
            "itl_s": summary["itl_s"]["p50"],
            "ttft_s": summary["ttft_s"]["mean"],
            "cached": sum(sum(answer.cached.values()) for answer in answers),
        }

    @staticmethod
    def _medians(rows: list[Result]) -> Result:
        names = ("tokens_per_s", "itl_s", "ttft_s")
        figures: Result = {name: spread([row[name] for row in rows]) for name in names}
        return {**figures, "repeats": rows}

    @staticmethod
    def _ratios(rows: Mapping[str, list[Result]]) -> Result:
        """Of each server to stock, by figure."""
        if STOCK not in rows:
            return {}
        return {
            subject: {
                name: compare(
                    [row[name] for row in rows[subject]], [row[name] for row in rows[STOCK]]
                )
                for name in ("tokens_per_s", "itl_s", "ttft_s")
            }
            for subject in rows
            if subject != STOCK
        }


class Prefix(Phase):
    """TTFT of a long prefix: cold, on the device, only in host memory."""

    def __init__(self, repeats: int, pool_tokens: int, prefix_tokens: int = PREFIX_TOKENS) -> None:
        self.name = "prefix"
        self.title = f"TTFT of a {prefix_tokens:,}-token prefix, {repeats} times"
        self._prefix_tokens = prefix_tokens
        self._steps = list(workloads.prefix_steps(repeats, pool_tokens, prefix_tokens))

    def steps(self, servers: Servers) -> int:
        return len(servers) * len(self._steps)

    def run(self, servers: Servers, advance: Advance) -> Result:
        for server in servers.values():
            server.flush()
        asked = asyncio.run(self._ask(servers, advance))
        subjects = {subject: self._summary(rows) for subject, rows in asked.items()}
        return {"title": self.title, "subjects": subjects}

    async def _ask(self, servers: Servers, advance: Advance) -> dict[str, list[Result]]:
        asked: dict[str, list[Result]] = defaultdict(list)
        rng = random.Random(4)
        prefixes: dict[int, tuple[int, ...]] = {}
        for step in self._steps:
            prefix = prefixes.setdefault(step.prefix, workloads.words(rng, self._prefix_tokens))
            prompt = prefix + workloads.words(rng, QUESTION_TOKENS)
            for subject, server in servers.items():
                async with Client(server.url) as client:
                    await asyncio.sleep(0.05)  # what the last one left behind it is over
                    answer = await client.ask(prompt, 2)
                asked[subject].append(
                    {**asdict(step), "tier": self._tier(answer.cached), **_raw(answer)}
                )
                advance()
        return asked

    def _tier(self, cached: Mapping[str, int]) -> str:
        """Which tier had all of the prefix; "cold" where none had anything, "mixed" in between."""
        if not sum(cached.values()):
            return "cold"
        whole = (tier for tier, tokens in cached.items() if tokens >= self._prefix_tokens)
        return next(whole, "mixed")

    @staticmethod
    def _summary(rows: list[Result]) -> Result:
        """TTFT by where the prefix really was."""
        by_tier: dict[str, list[float]] = defaultdict(list)
        for row in rows:
            if row["expected"] != "filler":
                by_tier[row["tier"]].append(row["ttft_s"])
        figures: Result = {tier: spread(values) for tier, values in by_tier.items()}
        if by_tier["host"] and by_tier["cold"]:
            figures["cold_over_host"] = times_faster(by_tier["cold"], by_tier["host"])
        return {**figures, "asks": rows}


def _raw(answer: Answer) -> Result:
    """For the JSON; output ids are left out."""
    return {
        "conversation": answer.conversation,
        "prompt_tokens": answer.prompt_tokens,
        "sent_s": round(answer.sent_s, 6),
        "ttft_s": answer.ttft_s,
        "token_s": [round(second, 6) for second in answer.token_s],
        "cached": answer.cached,
    }


def make_phases(options: Namespace) -> list[Phase]:
    """All phases in the order in which they run, or those of `--only`."""
    working_set = WORKING_SET * options.pool_tokens
    repeats = options.repeats or (4 if options.quick else 16)
    phases: list[Phase] = [
        Prefix(max(2, repeats // 2), options.pool_tokens),
        TakingTurns(repeats),
        OneAfterTheOther(
            # Fewer and longer turns when it has to be quick; the chats are as long.
            workloads.chats(working_set=working_set, added_tokens=132 if options.quick else 24)
        ),
        OneAfterTheOther(
            workloads.documents(working_set=working_set, questions=2 if options.quick else 6)
        ),
    ]
    only = options.only
    return [phase for phase in phases if not only or phase.name in only]
