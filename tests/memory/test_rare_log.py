import logging

from smg_sglang.memory.rare_log import RareLog

log = logging.getLogger(__name__)


def test_what_happens_often_is_told_at_powers_of_two(caplog):
    rare = RareLog(log)
    for n in range(1000):
        rare.warn("refused", str(n))
    assert len(caplog.records) == 10
    rare.warn("something else")
    assert len(caplog.records) == 11, "another kind is not hidden"


def test_ever_new_kinds_do_not_flood_either(caplog):
    rare = RareLog(log, most_kinds=4)
    for n in range(1000):
        rare.warn(f"reason {n}")
    assert len(caplog.records) < 20
