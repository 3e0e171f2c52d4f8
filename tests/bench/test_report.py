"""A promise is kept, broken, or not decided by what was measured."""

import pytest

from bench.__main__ import parse
from bench.serving import report
from bench.serving.phases import make_phases
from bench.serving.statistics import compare, times_faster
from bench.serving.subjects import PAGE_SIZE


@pytest.mark.parametrize(
    ("noise", "loss", "holds"),
    [(0.001, 1.0, True), (0.001, 1.05, False), (0.2, 1.0, None), (0.001, 0.9, True)],
)
def test_within_one_percent_is_told_only_from_narrow_intervals(noise, loss, holds):
    pairs = [loss * (1 + noise * (-1) ** i) for i in range(16)]
    latency = compare(pairs, [1.0] * 16)
    rate = compare([1 / x for x in pairs], [1.0] * 16)
    phases = {"no_reuse": {"ratios": {"smg": {"itl_s": latency, "tokens_per_s": rate}}}}
    assert [verdict.holds for verdict in report.verdicts(phases)] == [holds, holds]


@pytest.mark.parametrize(("cold", "holds"), [(20.0, True), (10.0, False)])
def test_a_host_hit_is_held_against_cold(cold, holds):
    times = times_faster([cold, 1.01 * cold, cold], [1.0, 1.0, 1.01])
    phases = {"prefix": {"subjects": {"smg": {"cold_over_host": times}}}}
    (verdict,) = report.verdicts(phases)
    assert verdict.holds is holds


def test_a_run_of_some_phases_judges_only_those():
    assert report.verdicts({}) == []


def reuse(times, findable):
    """Chats whose first token comes so many times sooner than stock's, where a cache without end
    finds such a share of their prompts."""

    def row(mean):
        return {"ttft_s": {"mean": mean}, "of_infinite": 1.0, "infinite_hit_share": findable}

    return {"chats": {"subjects": {"stock": row(times), "smg": row(1.0)}}}


@pytest.mark.parametrize(
    ("times", "findable", "holds"),
    [(4.1, 0.85, True), (3.9, 0.85, False), (2.4, 0.6, None), (4.1, 0.6, True), (3.9, 0.75, False)],
)
def test_reuse_is_judged_only_where_enough_of_the_prompts_can_be_found(times, findable, holds):
    sooner, hits = report.verdicts(reuse(times, findable))
    assert sooner.holds is holds and hits.holds is True
    assert ("40% of the prompt tokens are new" in sooner.measured) is (holds is None)


def findable(arguments):
    """By phase: the share of its prompts that a cache without end has."""
    found = {}
    for phase in make_phases(parse(["--only", "chats,documents", *arguments])):
        workload = phase.workload
        hits = sum(workload.infinite_hits(PAGE_SIZE))
        found[phase.name] = hits / sum(workload.prompt_lengths())
    return found


def test_a_full_run_can_be_judged_and_a_quick_one_is_not():
    judged = {
        name: [report.verdicts(reuse(3.9, share))[0].holds for share in found.values()]
        for name, found in (("full", findable([])), ("quick", findable(["--quick"])))
    }
    assert judged == {"full": [False, False], "quick": [None, None]}
