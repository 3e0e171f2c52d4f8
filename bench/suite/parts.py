"""What `make bench-all` runs, in which order, and for how long at most."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.suite import extract
from bench.suite.figures import Figure

BENCH = Path(__file__).parents[1]
#: Public workload data, where there is some: beside the project, or where SMG_TRACES says.
#: `bench/replay` says in its help where the originals are.
DATA = Path(os.environ.get("SMG_TRACES", BENCH.parents[1] / "shared" / "data"))
TRACES = {
    "mooncake": DATA / "mooncake" / "conversation_trace.jsonl.gz",
    "agents": DATA / "agent_sessions" / "sessions.tgz",
}
#: A CPU serves a fraction of what these services did: another pace, and only a beginning. (Common
#: flags, those of a full run, those of a quick one.)
REPLAYED = {
    "mooncake": (("--speed", "0.15"), ("--limit", "60"), ("--limit", "30")),
    "agents": (("--speed", "2.5", "--sessions", "6"), ("--limit", "60"), ("--limit", "30")),
}


@dataclass(frozen=True)
class Part:
    """One benchmark.

    Attributes:
        command: arguments to Python; "{json}" stands for the file that it writes.
        full, quick: more arguments, and the timeout in seconds, of a full and a quick run.
        needs: a file without which it cannot run.
    """

    name: str
    command: tuple[str, ...]
    figures: Callable[[Any], Iterable[Figure]]
    full: tuple[tuple[str, ...], float]
    quick: tuple[tuple[str, ...], float]
    needs: Path | None = None

    def arguments(self, *, quick: bool, json: Path) -> list[str]:
        more, _ = self.quick if quick else self.full
        return [word.replace("{json}", str(json)) for word in (*self.command, *more)]

    def timeout_s(self, *, quick: bool) -> float:
        return (self.quick if quick else self.full)[1]


def script(name: str) -> str:
    return str(BENCH / f"{name}.py")


def parts() -> list[Part]:
    """All of them; servers first, since their figures are what people come for."""
    return [
        Part(
            "serving",
            ("-m", "bench", "--json", "{json}"),
            extract.serving,
            full=(("--repeats", "8"), 1200),
            quick=(("--quick", "--repeats", "3", "--only", "prefix,no_reuse,chats"), 480),
        ),
        Part(
            "programs",
            ("-m", "bench.programs", "--json", "{json}"),
            extract.programs,
            full=((), 900),
            quick=(("--quick",), 420),
        ),
        *(replay(name, path) for name, path in TRACES.items()),
        Part(
            "split",
            ("-m", "bench.split", "--out", "{json}"),
            extract.split,
            full=(("--turns", "1", "--hand-offs", "3"), 900),
            quick=(("--turns", "1", "--longs", "1", "--hand-offs", "1"), 300),
        ),
        Part(
            "context",
            ("-m", "bench.context", "--out", "{json}"),
            extract.context,
            full=(("--repeats", "3"), 480),
            quick=(("--quick", "--tokens", "3968"), 300),
        ),
        *small_parts(),
    ]


def replay(name: str, path: Path) -> Part:
    """A trace against stock and ours."""
    common, full, quick = REPLAYED[name]
    return Part(
        f"replay-{name}",
        ("-m", "bench.replay", str(path), "--json", "{json}", *common),
        extract.own_figures,
        full=(full, 900),
        quick=(quick, 300),
        needs=path,
    )


def small_parts() -> list[Part]:
    """Without a server, seconds to a minute each."""
    return [
        Part(
            "attention",
            (script("attention"), "--kinds", "cached prefix", "--dtypes", "bfloat16"),
            extract.attention,
            full=(("--out", "{json}"), 300),
            quick=(("--rounds", "2", "--out", "{json}"), 120),
        ),
        Part(
            "tree",
            (script("tree"), "--page-sizes", "16", "--leaves", "10000", "--out", "{json}"),
            extract.tree,
            full=((), 240),
            quick=(("--rounds", "20"), 120),
        ),
        Part(
            "memory",
            (script("memory"), "--out", "{json}"),
            extract.memory,
            full=((), 120),
            quick=(("--quick",), 60),
        ),
        Part(
            "transfer",
            (script("transfer"), "--orders", "random", "--out", "{json}"),
            extract.transfer,
            full=((), 180),
            quick=(("--shapes", "SmolLM2-135M", "--rounds", "5"), 60),
        ),
    ]
