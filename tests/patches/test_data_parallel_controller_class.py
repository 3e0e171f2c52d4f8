"""0007: which data-parallel controller the controller process builds, and what it does with it."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest

from smg_sglang.engine.options.record import ATTRIBUTE

MODULE = "sglang.srt.managers.data_parallel_controller"
TARGET = f"{MODULE}.DataParallelController".removeprefix("sglang.srt.")
REGISTRY = "sglang.srt.plugins.data_parallel"
LIMITS = {"max_total_num_tokens": 640, "max_req_input_len": 512, "startup_time": None}

SPLIT = {ATTRIBUTE: {"config": {}, "plans": ["one worker"]}}
TIER_ONLY = {ATTRIBUTE: {"config": {}}}
PLAIN: dict[str, object] = {}
STOCK = ["stock built", "stock served"]
PHASES = ["phases started", "phases served", "phases closed"]


@pytest.fixture
def events(monkeypatch):
    """What happened, in order: SGLang's controller and our shell start no workers here."""
    from sglang.srt.managers.data_parallel_controller import DataParallelController

    from smg_sglang.engine.split import controller as phase_controller

    seen = []

    def build(self, *given):
        seen.append("stock built")
        self.given, self.scheduler_procs, self.local_kv_event_sources = given, [], []

    monkeypatch.setattr(DataParallelController, "__init__", build)
    monkeypatch.setattr(DataParallelController, "get_init_info", lambda self: LIMITS)
    monkeypatch.setattr(
        DataParallelController, "event_loop", lambda self: seen.append("stock served")
    )
    monkeypatch.setattr(
        phase_controller,
        "PhaseShell",
        lambda *given: SimpleNamespace(
            start=lambda: seen.append("phases started"),
            run=lambda: seen.append("phases served"),
            close=lambda: seen.append("phases closed"),
            links=[SimpleNamespace(is_prefill=False, init_info=LIMITS)],
        ),
    )
    monkeypatch.setattr(phase_controller.signal, "signal", lambda *handler: None)
    return seen


def run(source, mark, controller_class, **names):
    """The message that the controller process sends to its parent."""
    sent = []
    function = source.function(
        MODULE,
        "run_data_parallel_controller_process",
        DataParallelController=controller_class,
        get_parallel=lambda: SimpleNamespace(node_rank=0),
        get_exec=lambda: SimpleNamespace(moe=SimpleNamespace(is_ep_scale_joiner=False)),
        get_serving=lambda: SimpleNamespace(grpc_port=None),
        SCHEDULER_PIDS_ARG="scheduler_pids",
        **names,
    )
    function(SimpleNamespace(**mark), None, SimpleNamespace(send=sent.append), lambda: None)
    (message,) = sent
    return message


def choose(server_args):
    """What our plugin would register where SGLang has the patch."""
    from smg_sglang.engine.split.controller import PhaseDataParallelController

    marked = "plans" in getattr(server_args, ATTRIBUTE, {})
    return PhaseDataParallelController if marked else None


@pytest.mark.parametrize(
    ("mark", "expected"),
    [(SPLIT, PHASES), (TIER_ONLY, STOCK), (PLAIN, STOCK)],
    ids=["split", "tier only", "plain"],
)
def test_hook_and_patch_build_the_phase_controller_only_for_a_split(
    sglangs, events, mark, expected
):
    from sglang.srt.managers.data_parallel_controller import DataParallelController

    hooks, stock, patched = sglangs
    hooked = run(stock, mark, hooks.wrap(TARGET, DataParallelController))
    done = events.copy()
    events.clear()
    registry = patched.module(REGISTRY)
    registry.register_data_parallel_controller(choose)
    seam = {"data_parallel_controller_class": registry.data_parallel_controller_class}
    assert hooked == run(patched, mark, DataParallelController, **seam)
    assert hooked == {"status": "ready", "scheduler_pids": []} | LIMITS
    assert done == events == expected


def test_without_a_choice_it_is_sglangs_own(patched):
    registry = patched.module(REGISTRY)
    assert registry.data_parallel_controller_class(SimpleNamespace(), int) is int
    registry.register_data_parallel_controller(lambda server_args: None)
    assert registry.data_parallel_controller_class(SimpleNamespace(), int) is int
    registry.register_data_parallel_controller(lambda server_args: bool)
    registry.register_data_parallel_controller(lambda server_args: str)
    assert registry.data_parallel_controller_class(SimpleNamespace(), int) is bool


def test_with_dp_size_2_and_no_flag_the_replaced_class_is_sglangs_controller(hooks, events):
    from sglang.srt.managers.data_parallel_controller import DataParallelController

    replaced = hooks.wrap(TARGET, DataParallelController)
    assert issubclass(replaced, DataParallelController)
    ours = {name for name, value in vars(replaced).items() if inspect.isfunction(value)}
    assert ours == {"__init__", "get_init_info", "event_loop"}
    given = (SimpleNamespace(dp_size=2), "ports", run, {(0, 0): (1, None)})
    controller = replaced(*given)
    controller.event_loop()
    assert controller.given == given
    assert controller.get_init_info() is LIMITS
    assert events == STOCK
