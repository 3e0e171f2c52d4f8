"""What the doctor says of one thing."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Verdict(StrEnum):
    """ok: as it should be. advice: works, and could be better. wrong: will not work."""

    OK = "ok"
    ADVICE = "advice"
    WRONG = "wrong"


class Finding(msgspec.Struct, frozen=True):
    """What was looked at, what was found, and the mend where it is not as it should be."""

    what: str
    found: str
    verdict: Verdict = Verdict.OK
    mend: str | None = None


def first_line(error: Exception) -> str:
    """What an error says, as far as it fits a table; its kind where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def advice(what: str, found: str, mend: str) -> Finding:
    """It could be better."""
    return Finding(what, found, Verdict.ADVICE, mend)


def wrong(what: str, found: str, mend: str) -> Finding:
    """It will not work."""
    return Finding(what, found, Verdict.WRONG, mend)
