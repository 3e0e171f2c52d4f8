"""Tree of thought: propose plans, score each, go on from the best, and conclude.

Uses `fork`, `select`, forks of forks, and `join`. Every branch shares its parent's prompt.
"""

from __future__ import annotations

import random

import sglang as sgl

from bench.programs.endpoint import CountingEndpoint
from bench.programs.texts import CITIES, GOODS, essay

BRANCHES, SCORES = 3, (" weak", " fair", " good")


def thought(s, number: int) -> None:
    """One plan's beginning, and what is to be thought of it."""
    s += f"\nPlan {number} begins:" + sgl.gen("thought", max_tokens=16, stop="\n")
    s += "\nThis plan is" + sgl.gen("score", choices=list(SCORES))


def think(s, branches: int):
    """Branches that each add a thought and its score."""
    s.sync()  # `fork` sends the shared prompt ahead only if its text is there by then
    forks = s.fork(branches)
    for number, fork in enumerate(forks, 1):
        thought(fork, number)
    return forks


def best(forks):
    """The branch with the highest score; the first of equals."""
    return max(forks, key=lambda fork: SCORES.index(fork["score"]))


@sgl.function
def solve(s, situation: str, question: str):
    """Two levels of thoughts, then an answer from the best of the second."""
    s += f"{situation}\n\nQuestion: {question}"
    plans = think(s, BRANCHES)
    plan = best(plans)
    steps = think(plan, BRANCHES)
    step = best(steps)
    step += "\nSo the answer is:" + sgl.gen("answer", max_tokens=16, stop="\n")
    s["plan"], s["answer"] = f"{plan['thought']} / {step['thought']}", step["answer"]
    # What was joined has ended, and hangs when it is asked for more: so last, inside out.
    steps.join()
    plans.join()


def arguments(count: int, seed: int = 2) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [
        {
            "situation": essay(rng, 18),
            "question": f"How do we get {rng.choice(GOODS)} to {rng.choice(CITIES)} in time?",
        }
        for _ in range(count)
    ]


def run(backend: CountingEndpoint, size: int) -> list[str]:
    """`2 * size` problems, two at a time."""
    states = solve.run_batch(arguments(2 * size), temperature=0, num_threads=2, backend=backend)
    return [f"{s['plan']}|{s['answer']}" for s in states]
