"""The `smg:` series of `/metrics`, and the plain counters they are made from.

The counters are plain integers and floats: each has one writing thread, so the scheduler's path
takes no lock. `Series` turns them into Prometheus series, `TierMetrics` in a thread of its own.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger(__name__)

#: seconds; a lookup is bounded by --smg-lookup-timeout-ms (20 ms by default)
LOOKUP_BUCKETS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 1.0)
PUBLISH_EVERY_S = 2.0

#: Label values that are there from the start: a rate does not see what a new series begins with.
HIT_TIERS = ("device", "host", "storage")
LOOKUP_RESULTS = ("hit", "miss", "unavailable")
DROP_REASONS = ("memory_full", "queue_full", "unavailable", "error", "closed")


def with_zeros(labels: Sequence[str], counted: Mapping[str, float]) -> dict[str, float]:
    """`counted` by label, and 0 for those of `labels` that it lacks."""
    return {**dict.fromkeys(labels, 0), **counted}


@dataclass
class TierCounters:
    """What one worker has seen of the host tier since it started.

    Scheduler thread only; `dropped_pages`, by reason, is what was to be copied before the scheduler
    went on. What copies in the background count is theirs (`SpillQueue`, `LayerLoads`).
    """

    hit_tokens: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    prefetched_tokens: int = 0
    lookups: Counter[str] = field(default_factory=Counter)
    dropped_pages: Counter[str] = field(default_factory=Counter)

    def snapshot(self) -> dict[str, dict[str, float]]:
        """The labelled counters as plain dictionaries."""
        return {
            "hit_tokens": dict(self.hit_tokens),
            "lookups": dict(self.lookups),
            "dropped_pages": dict(self.dropped_pages),
        }


Table = Mapping[str, tuple[str, str, str | None]]
"""name -> (kind, help, label, several with blanks between them, or None)"""

_SERIES: Table = {
    "smg:hit_tokens": ("counter", "Prompt tokens found in a cache tier.", "tier"),
    "smg:prompt_tokens": ("counter", "Prompt tokens of admitted requests.", None),
    "smg:prefetched_tokens": ("counter", "Tokens loaded for requests that wait.", None),
    "smg:waited_requests": ("counter", "Requests that waited for a prefix and went on.", None),
    "smg:waited_steps": ("counter", "Scheduler steps in which requests waited for one.", None),
    "smg:wait_saved_tokens": ("counter", "Prompt tokens that waiting has saved.", None),
    "smg:lookups": ("counter", "Lookups in host memory by result.", "result"),
    "smg:hints": ("counter", "Hints about prefixes by what became of them.", "kind outcome"),
    "smg:dropped_pages": ("counter", "Pages that were not kept in host memory.", "reason"),
    "smg:waiting_spill_slots": ("gauge", "Device slots locked until they are copied.", None),
    "smg:spilled_bytes": ("counter", "Bytes copied from the device to host memory.", None),
    "smg:spill_seconds": ("counter", "Seconds spent copying to host memory.", None),
    "smg:loaded_bytes": ("counter", "Bytes loaded back from host memory to the device.", None),
    "smg:load_seconds": ("counter", "Seconds spent loading back from host memory.", None),
    "smg:load_wait_seconds": ("counter", "CPU seconds that forwards waited for loads.", None),
    "smg:failed_loads": ("counter", "Batches of loads whose copy raised.", None),
    "smg:host_pages": ("gauge", "Pages of the memory server by state.", "state"),
    "smg:retained_pages": ("gauge", "Host pages that hints retain.", None),
    "smg:host_bytes": ("gauge", "Size of the memory server's page memory in bytes.", None),
    "smg:leases": ("gauge", "Leases that pin host pages, over all servers attached.", None),
    "smg:evicted_pages": ("gauge", "Pages the memory server evicted since it started.", None),
    "smg:short_pages": ("gauge", "Pages refused for want of memory since it started.", None),
    "smg:quarantined_pages": (
        "gauge",
        "Pages kept for processes that lost their connection and may still copy.",
        None,
    ),
    "smg:refused_messages": ("gauge", "What the memory server turned away, by kind.", "kind"),
    "smg:stored_pages": ("gauge", "Pages of the storage process by what became of them.", "event"),
    "smg:storage_failures": (
        "gauge",
        "Calls of the storage backend that failed or were late.",
        None,
    ),
    "smg:storage_seconds": ("gauge", "Seconds that the storage backend took, by what.", "call"),
    "smg:storage_bytes": ("gauge", "Bytes that the storage backend moved, by what.", "call"),
    "smg:late_fetches": ("counter", "Requests that would not wait longer for storage.", None),
    "smg:storage_connected": ("gauge", "1 while the storage process answers, else 0.", None),
    "smg:memory_connected": ("gauge", "1 while the memory server answers, else 0.", None),
}

Reading = Mapping[str, float | Mapping[str, float]]
"""The current value of each series: a number, or numbers by label value (several: with blanks
between them). Counters are totals."""


class Series:
    """Prometheus series that are brought up to readings; each appears with its first value.

    One thread. Create it after SGLang has set PROMETHEUS_MULTIPROC_DIR.
    """

    def __init__(self, labels: Mapping[str, str], table: Table) -> None:
        self._labels = dict(labels)
        self._table = table
        self._series: dict[str, Any] = {}
        self._published: dict[tuple[str, str], float] = {}

    def histogram(self, name: str, text: str, buckets: Sequence[float], *more: str) -> Any:
        """A histogram with our labels, and `more` that are to be given."""
        from prometheus_client import Histogram

        return Histogram(name, text, [*self._labels, *more], buckets=buckets)

    def publish(self, reading: Reading) -> None:
        """Bring every series up to the current reading."""
        for name, value in reading.items():
            if isinstance(value, Mapping):
                for label, number in value.items():
                    self._set(name, label, number)
            else:
                self._set(name, "", value)

    def _set(self, name: str, label: str, value: float) -> None:
        kind, _, label_name = self._table[name]
        labels = dict(self._labels)
        if label_name:
            names = label_name.split()
            values = label.split() if len(names) > 1 else [label]
            labels |= dict(zip(names, values, strict=True))
        series = self._get(name).labels(**labels)
        if kind == "gauge":
            series.set(value)
            return
        grown = value - self._published.get((name, label), 0.0)
        self._published[name, label] = value
        if grown > 0:
            series.inc(grown)

    def _get(self, name: str) -> Any:
        from prometheus_client import Counter as PrometheusCounter
        from prometheus_client import Gauge

        if name not in self._series:
            kind, text, label = self._table[name]
            names = [*self._labels, *(label.split() if label else ())]
            if kind == "gauge":
                self._series[name] = Gauge(name, text, names, multiprocess_mode="mostrecent")
            else:
                self._series[name] = PrometheusCounter(name, text, names)
        return self._series[name]


class TierMetrics:
    """Publishes what `read` returns, called in the publishing thread, every two seconds."""

    def __init__(self, labels: Mapping[str, str], read: Callable[[], Reading]) -> None:
        self._read = read
        self._series = Series(labels, _SERIES)
        histogram = self._series.histogram(
            "smg:lookup_seconds",
            "Seconds the scheduler waited for a lookup in host memory.",
            LOOKUP_BUCKETS,
        )
        self.observe_lookup: Callable[[float], None] = histogram.labels(**labels).observe
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="smg-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop publishing; idempotent."""
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        failed = False
        while not self._stop.wait(PUBLISH_EVERY_S):
            try:
                self._series.publish(self._read())
                failed = False
            except Exception:
                if not failed:  # once, not every two seconds
                    logger.exception("smg: metrics could not be published")
                failed = True
