"""The controller's series in `/metrics`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sglang.srt.arg_groups.overrides import resolving_view

from smg_sglang.engine.split.plan import WorkerPlan
from smg_sglang.phase.requests import Stage

if TYPE_CHECKING:
    from smg_sglang.phase.controller import PhaseController

SECONDS_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)

_COUNTERS = {
    "smg:routed_requests": (
        "Requests by route; repaired ones were sent to a prefill worker that could not do them.",
        "route",
        ("split", "direct", "repaired"),
    ),
    "smg:ended_requests": (
        "Requests that the controller ended or sent again.",
        "how",
        ("aborted", "failed", "retried"),
    ),
    "smg:worker_deaths": ("Workers that died, by role.", "role", ("prefill", "decode")),
}


class PhaseMetrics:
    """Silent unless SGLang's metrics are enabled. Controller thread only."""

    def __init__(self, labels: dict[str, str], plans: Sequence[WorkerPlan]) -> None:
        self.enabled = bool(labels)
        self.stale = False
        self._plans = plans
        self._labels = labels
        self._published: dict[tuple[str, str], int] = {}
        if self.enabled:
            self._make_series()

    @classmethod
    def make(cls, server_args: Any, plans: Sequence[WorkerPlan]) -> PhaseMetrics:
        view = resolving_view(server_args)
        if not view.enable_metrics:
            return cls({}, plans)
        return cls({"model_name": view.served_model_name or view.model_path}, plans)

    def _make_series(self) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        names = list(self._labels)
        self._seconds = Histogram(
            "smg:phase_seconds",
            "Seconds of a request: prefill (arrival to its pages in memory), first_decode (from "
            "there to its first token: hand-off, queue and the last page), direct (arrival to "
            "first token without a prefill worker).",
            [*names, "stage"],
            buckets=SECONDS_BUCKETS,
        )
        self._counters = {
            name: Counter(name, text, [*names, label])
            for name, (text, label, _) in _COUNTERS.items()
        }
        self._stages = Gauge(
            "smg:phase_requests",
            "Requests by stage.",
            [*names, "stage"],
            multiprocess_mode="mostrecent",
        )
        self._queued = Gauge(
            "smg:worker_queued_tokens",
            "Prompt tokens a worker owes.",
            [*names, "worker"],
            multiprocess_mode="mostrecent",
        )
        self._up = Gauge(
            "smg:worker_up",
            "1 while a worker runs.",
            [*names, "worker"],
            multiprocess_mode="mostrecent",
        )

    def observe(self, stage: str, seconds: float) -> None:
        """Called by the phase controller."""
        self.stale = True
        if self.enabled:
            self._seconds.labels(**self._labels, stage=stage).observe(seconds)

    def publish(self, machine: PhaseController) -> None:
        """Bring the series up to what the controller counts."""
        self.stale = bool(machine.requests)
        in_stage = machine.in_stage()
        for stage in Stage:
            self._stages.labels(**self._labels, stage=str(stage)).set(in_stage[stage])
        for plan, worker in zip(self._plans, machine.workers, strict=True):
            labels = {**self._labels, "worker": f"{plan.role}-{plan.index}"}
            self._queued.labels(**labels).set(worker.queued_tokens)
            self._up.labels(**labels).set(worker.up)
        for name, (_, label, values) in _COUNTERS.items():
            for value in values:
                key = f"died:{value}" if label == "role" else value
                self._count(name, label, value, machine.counters[key])

    def _count(self, name: str, label: str, value: str, total: int) -> None:
        grown = total - self._published.get((name, value), 0)
        self._published[name, value] = total
        if grown > 0:
            self._counters[name].labels(**self._labels, **{label: value}).inc(grown)
