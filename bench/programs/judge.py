"""A judge who looks at each essay from several sides at once, and comes back for a second opinion.

Uses roles, `fork` with parallel branches, `join`, and `run_batch`. Between the two opinions all
other essays are judged, so that a small device has forgotten the first.
"""

from __future__ import annotations

import random

import sglang as sgl

from bench.programs.endpoint import CountingEndpoint
from bench.programs.texts import essay

SIDES = ("clarity", "style", "evidence", "order")
GRADES = ("A", "B", "C")


def remark(s, side: str, opinion: str) -> None:
    """A few words about one side, and its grade."""
    s += sgl.user(f"Judge its {side}, {opinion}.")
    s += sgl.assistant(
        sgl.gen("remark", max_tokens=12) + " Grade: " + sgl.gen("grade", choices=list(GRADES))
    )


@sgl.function
def judge(s, text: str, opinion: str):
    """A remark and a grade from each side, then a verdict that has seen them all."""
    s += sgl.system("You judge essays, in few words.")
    s += sgl.user(f"The essay:\n{text}")
    s.sync()  # `fork` sends the shared prompt ahead only if its text is there by then
    forks = s.fork(len(SIDES))
    for side, fork in zip(SIDES, forks, strict=True):
        remark(fork, side, opinion)
    forks.join()
    said = "; ".join(f"{side}: {f['grade']}" for side, f in zip(SIDES, forks, strict=True))
    s["remarks"] = "|".join(f["remark"] for f in forks)
    s += sgl.user(f"The grades are {said}. Your verdict, {opinion}?")
    s += sgl.assistant(sgl.gen("verdict", max_tokens=12))


def run(backend: CountingEndpoint, size: int) -> list[str]:
    """`2 * size` essays, each judged twice."""
    rng = random.Random(3)
    essays = [essay(rng, 20) for _ in range(2 * size)]
    said = []
    for opinion in ("first opinion", "second opinion"):
        work = [{"text": text, "opinion": opinion} for text in essays]
        states = judge.run_batch(work, temperature=0, num_threads=2, backend=backend)
        said += [f"{s['remarks']}|{s['verdict']}" for s in states]
    return said
