"""Prose for programs to work on: made from a seed, the same on every run, no files needed."""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

#: MT-bench's questions beside the project, or where SMG_TRACES says. Public original:
#: github.com/lm-sys/FastChat, fastchat/llm_judge/data/mt_bench/question.jsonl.
DATA = Path(os.environ.get("SMG_TRACES", Path(__file__).parents[3] / "shared" / "data"))
MT_BENCH = DATA / "mt_bench" / "question.jsonl"

NAMES = ("Ada", "Bruno", "Chen", "Dalia", "Emil", "Fatima", "Goran", "Hana", "Ivo", "Jun", "Kofi")
CITIES = ("Oslo", "Lima", "Accra", "Kyoto", "Porto", "Quito", "Riga", "Seoul", "Tunis", "Zagreb")
GOODS = ("lamps", "bicycles", "violins", "kettles", "maps", "radios", "clocks", "sails", "globes")
KINDS = ("invoice", "complaint", "order")
OPENINGS = (
    "The old harbour was quiet that morning",
    "Nobody had expected the bridge to be closed",
    "A committee of nine met in the library",
    "The survey of the valley took three summers",
    "Rain had fallen on the market for a week",
)
MIDDLES = (
    "and the people who kept the records wrote down every change they saw",
    "because the engineers could not agree on what had caused the first failure",
    "while the council looked for money to repair what the winter had broken",
    "so the teachers asked their pupils to measure the river each day",
    "although the newspapers had promised that the work would be finished by spring",
)


@dataclass(frozen=True)
class Record:
    """A note, and what is to be found in it."""

    note: str
    name: str
    year: str
    kind: str


def record(rng: random.Random) -> Record:
    """One short business note."""
    name, city, good = rng.choice(NAMES), rng.choice(CITIES), rng.choice(GOODS)
    year, kind, count = str(rng.randrange(1950, 2025)), rng.choice(KINDS), rng.randrange(2, 90)
    note = f"In {year} we got an {kind} about {count} {good} from {name}, who lived in {city} then."
    return Record(note, name, year, kind)


def essay(rng: random.Random, sentences: int) -> str:
    """About 24 tokens a sentence."""
    return " ".join(
        f"{rng.choice(OPENINGS)} in {rng.choice(CITIES)}, {rng.choice(MIDDLES)}."
        for _ in range(sentences)
    )


def questions(path: Path | None, count: int) -> list[tuple[str, str]]:
    """Two turns each: of MT-bench where the file is, else made up."""
    path = path or (MT_BENCH if MT_BENCH.exists() else None)
    if path is None:
        return [made_up(random.Random(number)) for number in range(count)]
    rows = [json.loads(line)["turns"] for line in path.read_text().splitlines() if line.strip()]
    short = [(first, second) for first, second in rows if len(first) < 1200]
    return short[:count]


def source(path: Path | None) -> str:
    """Whose questions those are, for titles: figures of one source are not those of another."""
    if path is not None and path.resolve() != MT_BENCH.resolve():
        return f"questions of {path.name}"
    return "MT-bench's questions" if path or MT_BENCH.exists() else "made-up questions"


def made_up(rng: random.Random) -> tuple[str, str]:
    """Two turns about an essay of its own."""
    text = essay(rng, 4)
    return (
        f"Summarise this: {text}",
        f"Now say it as {rng.choice(NAMES)} from {rng.choice(CITIES)}.",
    )
