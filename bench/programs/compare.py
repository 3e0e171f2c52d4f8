"""Are the outputs the same, and if not: is stock the same as itself?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Outputs = Sequence[str]


@dataclass(frozen=True)
class Comparison:
    """Outputs of several runs against one reference run.

    Attributes:
        compared: outputs of all runs together.
        different: those that are not the reference's.
        example: the first pair that differs, from where it does.
    """

    compared: int
    different: int
    example: tuple[str, str] | None

    @property
    def equal(self) -> bool:
        return not self.different


def compare_outputs(reference: Outputs, runs: Sequence[Outputs]) -> Comparison:
    """Output by output.

    Raises:
        ValueError: a run has not as many outputs as the reference.
    """
    pairs = [pair for run in runs for pair in zip(reference, run, strict=True)]
    wrong = [(a, b) for a, b in pairs if a != b]
    return Comparison(len(pairs), len(wrong), _from_difference(*wrong[0]) if wrong else None)


def _from_difference(a: str, b: str, context: int = 20, shown: int = 60) -> tuple[str, str]:
    same = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    start = max(0, same - context)
    return a[start : start + shown], b[start : start + shown]
