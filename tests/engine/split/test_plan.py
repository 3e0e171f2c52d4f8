"""Where workers run, who answers for the dead, and when they are started again."""

import pytest

from smg_sglang.config import make_config
from smg_sglang.engine.split.plan import make_plan
from smg_sglang.errors import ConfigError
from smg_sglang.phase.errands import Errand, Errands
from smg_sglang.phase.requests import Role
from smg_sglang.phase.restarts import FIRST_DELAY_S, MAX_FAILURES, STEADY_S, Restarts

P, D = Role.PREFILL, Role.DECODE


def devices(*roles, tp_size=1, num_cuda=0, **names):
    plans = make_plan(roles, tp_size=tp_size, num_cuda=num_cuda, **names)
    return [(plan.device, plan.gpu_id) for plan in plans]


def shares(*roles, **kwargs):
    plans = make_plan(roles, tp_size=1, **{"num_cuda": 0, **kwargs})
    return [round(plan.memory_share, 2) for plan in plans]


def test_on_a_cpu_each_rank_has_a_group_of_cores():
    assert devices(P, D, D, tp_size=2) == [("cpu", 0), ("cpu", 2), ("cpu", 4)]


def test_gpus_are_given_one_each_while_there_are_enough():
    assert devices(P, D, num_cuda=2) == [("cuda:0", 0), ("cuda:1", 1)]
    assert devices(P, D, num_cuda=4, tp_size=2) == [("cuda:0", 0), ("cuda:2", 2)]


def test_workers_share_the_first_gpu_where_there_are_too_few():
    assert devices(P, D, D, num_cuda=2) == [("cuda:0", 0)] * 3


def test_devices_can_be_named():
    names = {"prefill_devices": "cuda:1", "decode_devices": "cuda:0,cuda:2"}
    assert [name for name, _ in devices(P, D, D, num_cuda=3, **names)] == [
        "cuda:1",
        "cuda:0",
        "cuda:2",
    ]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ({"prefill_devices": "cuda:5"}, "there are 2"),
        ({"decode_devices": "cuda:0,cuda:1"}, "one for each of 1"),
        ({"decode_devices": "gpu1"}, "must look like"),
        ({"decode_devices": "cpu"}, "not supported yet"),
    ],
)
def test_devices_that_make_no_sense_are_refused(names, says):
    with pytest.raises(ConfigError, match=says):
        devices(P, D, num_cuda=2, **names)


def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="no CUDA device"):
        devices(P, D, prefill_devices="cuda:0")


def test_memory_is_shared_by_what_a_role_has_to_hold():
    assert shares(P, D) == [0.33, 0.67]
    assert shares(P, D, D) == [0.2, 0.4, 0.4]
    assert shares(P, D, num_cuda=2) == [1, 1]


@pytest.mark.parametrize(
    ("choice", "counts"),
    [
        ({}, (0, 0)),
        ({"prefill_workers": 2}, (2, 1)),
        ({"decode_workers": 3}, (1, 3)),
        ({"prefill_workers": 0, "decode_workers": 2}, (0, 2)),
    ],
)
def test_the_other_role_has_one_worker_by_default(choice, counts):
    config = make_config(host_gb=0.1, **choice)
    assert (config.prefill_workers, config.decode_workers) == counts


def test_one_worker_needs_no_controller():
    assert make_config(host_gb=0.1, prefill_workers=0).workers == 0


@pytest.mark.parametrize(
    ("choice", "flag"),
    [
        ({"prefill_workers": -1}, "--smg-prefill-workers"),
        ({"decode_workers": 0}, "--smg-decode-workers"),
        ({"prefill_workers": 1, "split_tokens": 0}, "--smg-split-tokens"),
        ({"split_tokens": 10}, "--smg-split-tokens needs"),
        ({"decode_devices": "cpu"}, "--smg-decode-devices needs"),
        ({"prefill_workers": 1, "write_policy": "write_back"}, "--smg-write-policy"),
    ],
)
def test_a_split_that_makes_no_sense_is_refused(choice, flag):
    with pytest.raises(ConfigError, match=flag):
        make_config(host_gb=0.1, **choice)


# ---- errands ----


def test_an_answer_settles_the_oldest_errand_of_its_type():
    errands = Errands()
    for message in ("first", "second"):
        errands.add(0, Errand(message, "Answer"))
    errands.add(0, Errand("other", "Other"))
    assert errands.answered(0, "Answer")
    assert [errand.message for errand in errands.owed(0)] == ["second", "other"]
    assert not errands.answered(1, "Answer")


def test_for_the_dead_only_some_errands_are_answered():
    errands = Errands()
    errands.add(0, Errand("flush", "Flushed"))
    errands.add(0, Errand("profile", "Profiled"))
    assert [e.message for e in errands.excuse(0, frozenset({"Flushed"}))] == ["flush"]
    assert [e.message for e in errands.owed(0)] == ["profile"], "it is sent again"


# ---- restarts ----


def test_restarts_come_later_and_later():
    restarts, delays = Restarts(), []
    for _ in range(MAX_FAILURES):
        assert not restarts.hopeless
        restarts.died(100.0)
        delays.append(restarts.due_at - 100.0)
    assert delays == [FIRST_DELAY_S * 2**n for n in range(MAX_FAILURES)]
    assert restarts.hopeless


def test_a_good_life_makes_earlier_deaths_forgotten():
    restarts = Restarts()
    for now in (0.0, 10.0, 20.0):
        restarts.died(now)
    restarts.came_up(30.0)
    restarts.died(30.0 + STEADY_S)
    assert restarts.failures == 1


def test_each_worker_has_the_weights_and_its_share_of_the_rest():
    pytest.importorskip("sglang")
    from smg_sglang.engine.split.memory_shares import share_bytes

    parts = [share_bytes(1000, weights=200, workers=2, share=share) for share in (1 / 3, 2 / 3)]
    assert parts == [200 + 200, 200 + 400]
