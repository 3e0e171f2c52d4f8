"""The controller's series in `/metrics`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sglang.srt.arg_groups.overrides import resolving_view

from smg_sglang.engine.split.plan import WorkerPlan
from smg_sglang.metrics import Series, Table
from smg_sglang.phase.requests import Stage

if TYPE_CHECKING:
    from smg_sglang.phase.controller import PhaseController

SECONDS_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)

_SERIES: Table = {
    "smg:routed_requests": (
        "counter",
        "Requests by route; repaired ones were sent to a prefill worker that could not do them.",
        "route",
    ),
    "smg:ended_requests": (
        "counter",
        "Requests that the controller ended or sent again.",
        "how",
    ),
    "smg:worker_deaths": ("counter", "Workers that died, by role.", "role"),
    "smg:phase_requests": ("gauge", "Requests by stage.", "stage"),
    "smg:worker_queued_tokens": ("gauge", "Prompt tokens a worker owes.", "worker"),
    "smg:worker_up": ("gauge", "1 while a worker runs.", "worker"),
}
#: What the controller calls its counters, by series and label.
_COUNTERS = {
    "smg:routed_requests": {name: name for name in ("split", "direct", "repaired")},
    "smg:ended_requests": {name: name for name in ("aborted", "failed", "retried")},
    "smg:worker_deaths": {role: f"died:{role}" for role in ("prefill", "decode")},
}


class PhaseMetrics:
    """Silent unless SGLang's metrics are enabled. Controller thread only."""

    def __init__(self, labels: dict[str, str], plans: Sequence[WorkerPlan]) -> None:
        self.enabled = bool(labels)
        self.stale = False
        self._plans = plans
        self._labels = labels
        self._series = Series(labels, _SERIES)
        if self.enabled:
            self._seconds = self._series.histogram(
                "smg:phase_seconds",
                "Seconds of a request: prefill (arrival to its pages in memory), first_decode "
                "(from there to its first token: hand-off, queue and the last page), direct "
                "(arrival to first token without a prefill worker).",
                SECONDS_BUCKETS,
                "stage",
            )

    @classmethod
    def make(cls, server_args: Any, plans: Sequence[WorkerPlan]) -> PhaseMetrics:
        view = resolving_view(server_args)
        if not view.enable_metrics:
            return cls({}, plans)
        return cls({"model_name": view.served_model_name or view.model_path}, plans)

    def observe(self, stage: str, seconds: float) -> None:
        """Called by the phase controller."""
        self.stale = True
        if self.enabled:
            self._seconds.labels(**self._labels, stage=stage).observe(seconds)

    def publish(self, machine: PhaseController) -> None:
        """Bring the series up to what the controller counts."""
        self.stale = bool(machine.requests)
        in_stage, counted = machine.in_stage(), machine.counters
        names = [f"{plan.role}-{plan.index}" for plan in self._plans]
        workers = dict(zip(names, machine.workers, strict=True))
        counters = {
            series: {label: counted[key] for label, key in keys.items()}
            for series, keys in _COUNTERS.items()
        }
        self._series.publish(
            {
                **counters,
                "smg:phase_requests": {str(stage): in_stage[stage] for stage in Stage},
                "smg:worker_queued_tokens": {n: w.queued_tokens for n, w in workers.items()},
                "smg:worker_up": {name: worker.up for name, worker in workers.items()},
            }
        )
