"""A promise is kept, broken, or not decided by what was measured."""

import pytest

from bench.serving import report
from bench.serving.statistics import compare, times_faster


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
