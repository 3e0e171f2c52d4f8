"""Tokens for block ids: equal ids give equal tokens, on every machine and in every run."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from bench.serving.workloads import FIRST_TOKEN, LAST_TOKEN

#: Words that no prompt of a trace has, so that warm-up leaves nothing that a trace could hit.
RESERVED = 64
#: A word with its blank, as byte-level BPE spells it. Such words stay whole wherever they stand.
WORD = re.compile("Ġ[a-z]{2,}")


@dataclass(frozen=True)
class Words:
    """Token ids that stand for themselves in any order, and their text where it is known."""

    ids: tuple[int, ...]
    texts: dict[int, str] | None = None

    @cached_property
    def for_prompts(self) -> tuple[int, ...]:
        return self.ids[:-RESERVED]

    @property
    def for_warm_up(self) -> tuple[int, ...]:
        return self.ids[-RESERVED:]

    def of(self, block: Any, count: int) -> tuple[int, ...]:
        """The first `count` tokens of a block; `block` is anything whose repr names it.

        Whatever `count` is, they begin alike.
        """
        pool = self.for_prompts
        numbers = (n for part in range(-(-count // 16)) for n in _numbers(f"{block!r}/{part}"))
        return tuple(pool[n % len(pool)] for n in islice(numbers, count))

    def text(self, tokens: Sequence[int]) -> str:
        """Text that the tokenizer turns into just these tokens.

        Raises:
            ValueError: the tokenizer is not known.
        """
        if self.texts is None:
            raise ValueError("no tokenizer.json was found: ask with token ids")
        return "".join(self.texts[token] for token in tokens)


def _numbers(name: str) -> tuple[int, ...]:
    """16 numbers below 2**32 that follow from a name."""
    return struct.unpack("16I", blake2b(name.encode()).digest())


def plain_ids() -> Words:
    """Where no tokenizer is at hand; good for token ids only."""
    return Words(tuple(range(FIRST_TOKEN, LAST_TOKEN)))


def words_of(model: str | Path) -> Words:
    """Lower-case words that are one token of a model's byte-level BPE, each after a blank.

    Such a tokenizer splits at blanks before it merges, so a text of these words has exactly their
    tokens. `plain_ids` where there is no such tokenizer.
    """
    path = Path(model) / "tokenizer.json"
    if not path.is_file():
        return plain_ids()
    vocabulary: dict[str, int] = json.loads(path.read_text())["model"].get("vocab", {})
    if not isinstance(vocabulary, dict):
        return plain_ids()
    found = {number: " " + word[1:] for word, number in vocabulary.items() if WORD.fullmatch(word)}
    if len(found) < 10 * RESERVED:
        return plain_ids()
    return Words(tuple(sorted(found)), found)
