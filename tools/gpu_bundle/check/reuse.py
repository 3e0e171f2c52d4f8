"""Three servers of the same model, and what they are asked in turn."""

from __future__ import annotations

import random
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

from bench.serving import workloads
from bench.serving.phases import OneAfterTheOther, Phase, Prefix, TakingTurns
from bench.serving.subjects import (
    HICACHE,
    SMG,
    STOCK,
    attention_backend,
    server_args,
    server_env,
)
from bench.serving.workloads import Turn, Workload, words
from tools.gpu_bundle.check.scale import Scale, model
from tools.gpu_bundle.check.table import Table
from tools.sglang_server import ServerDied, SglangServer

Servers = dict[str, SglangServer]
TURNS, ANSWER, ADDED = 5, 24, 104


@contextmanager
def servers(scale: Scale, logs: Path, seconds: float, table: Table) -> Iterator[Servers]:
    """Those that are ready in time; what became of each is a row. Booted together."""
    options = Namespace(
        dtype=scale.dtype,
        pool_tokens=scale.pool,
        host_gb=scale.host_gb,
        attention_backend="" if scale.on_gpu else attention_backend(None),
        server_args=scale.server_args,
    )
    began, path = monotonic(), model(scale)
    started = {
        subject: SglangServer(
            path, server_args(subject, options), server_env(subject), logs / f"{subject}.log"
        )
        for subject in (STOCK, HICACHE, SMG)
    }
    try:
        yield {
            subject: server
            for subject, server in started.items()
            if _is_ready(subject, server, seconds - (monotonic() - began), table)
        }
    finally:
        for server in started.values():
            server.stop()


def _is_ready(subject: str, server: SglangServer, seconds: float, table: Table) -> bool:
    try:
        server.wait_ready(max(1.0, seconds))
    except ServerDied as died:
        last = str(died).strip().splitlines()[-1]
        table.row("servers", subject, f"NOT READY: {last[:120]}", log=str(server.log))
        return False
    table.row("servers", subject, f"ready after {server.ready_s:.0f} s", seconds=server.ready_s)
    return True


def phases(scale: Scale) -> list[Phase]:
    """P8, P9, the minimum distance and P3, in the order in which they run."""
    chat = 4 * scale.pool // scale.chats
    first = chat - ANSWER - (TURNS - 1) * (ADDED + ANSWER)
    chats = workloads.chats(
        working_set=4 * scale.pool,
        chat_tokens=chat,
        first_tokens=first,
        added_tokens=ADDED,
        answer_tokens=ANSWER,
        concurrency=scale.concurrency,
    )
    unshared = {"requests": scale.concurrency, "prompt_tokens": scale.unshared}
    return [
        Prefix(2, scale.pool, scale.prefix),
        OneAfterTheOther(chats),
        OneAfterTheOther(documents_again(scale)),
        TakingTurns(2, concurrency=scale.concurrency, **unshared),
    ]


def documents_again(scale: Scale) -> Workload:
    """Every document once, then all of them again in the same order: a device cache that is smaller
    than they are has none of them then."""
    rng = random.Random(5)
    texts = [words(rng, scale.document) for _ in range(scale.documents)]
    turns = tuple(
        Turn(number, text + words(rng, 16), 16) for number, text in enumerate(texts + texts)
    )
    title = f"{scale.documents} documents of {scale.document:,} tokens, twice in the same order"
    return Workload("documents", title, turns, scale.concurrency)


def ask(servers: Servers, scale: Scale, table: Table, turn: int) -> dict[str, Any]:
    """Runs all phases once; rows as each is done. Returns the raw results."""
    done: dict[str, Any] = {}
    for phase in phases(scale):
        began = monotonic()
        done[phase.name] = result = phase.run(servers, lambda: None)
        for subject, found in result["subjects"].items():
            what = f"{phase.name}, {subject}, turn {turn}"
            table.row("reuse", what, _figure(found), seconds=monotonic() - began)
    return done


def _figure(found: dict[str, Any]) -> str:
    """The figures of a subject that a line has room for."""
    shown = []
    for name in (
        "cold",
        "device",
        "host",
        "mixed",
        "tokens_per_s",
        "ttft_s",
        "itl_s",
        "of_infinite",
    ):
        value = found.get(name)
        if isinstance(value, dict):
            value = value.get("p50", value.get("mean"))
        if isinstance(value, int | float):
            shown.append(f"{name} {value:.4g}")
    return ", ".join(shown) or "no figure"
