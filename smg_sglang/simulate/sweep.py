"""Several sizes of host memory and several policies on one trace: what each buys."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from smg_sglang.box import GIB
from smg_sglang.config import EvictionName
from smg_sglang.errors import ConfigError
from smg_sglang.simulate.bounds import belady_hits, infinite_hits, page_runs
from smg_sglang.simulate.run import Outcome, simulate
from smg_sglang.simulate.settings import Settings
from smg_sglang.trace.request import Request

#: Sizes of a sweep as shares of what the trace would fill.
_SHARES = (0.0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


class Bounds(msgspec.Struct, frozen=True):
    """Hit shares that no server can exceed, over the requests that fit on the device.

    Attributes:
        infinite: of a cache that forgets nothing.
        belady: by GiB of host memory: the most that a single level as large as device pool and
            host memory together can have (see `bounds.belady_hits`).
        whole_gb: host memory that holds all prompts of the trace, in GiB.
    """

    infinite: float
    belady: dict[float, float]
    whole_gb: float


class Sweep(msgspec.Struct, frozen=True):
    """All runs of a sweep and their bounds.

    Attributes:
        requests: of the trace.
        refused_requests, refused_tokens: those of them that are longer than the device's pool,
            and their prompts; no other figure counts them.
    """

    requests: int
    refused_requests: int
    refused_tokens: int
    runs: list[Outcome]
    bounds: Bounds


def sweep_sizes(whole_gb: float, page_gb: float) -> list[float]:
    """Sizes in GiB from none to all that the trace would fill, with three digits; each once, and
    none that a page does not fit in."""
    sizes = [whole_gb * share for share in _SHARES]
    return list(dict.fromkeys(_rounded(gb, page_gb) for gb in sizes if not 0 < gb < page_gb))


def _rounded(gb: float, page_gb: float) -> float:
    rounded = float(f"{gb:.3g}")
    return page_gb if 0 < rounded < page_gb else rounded


def run_sweep(
    requests: Sequence[Request],
    settings: Settings,
    policies: Sequence[EvictionName],
    sizes: Sequence[float] | None,
    progress: Callable[[str, int], None] = lambda what, finished: None,
) -> Sweep:
    """A run for each policy and size; without host memory, policies do not differ. `sizes`: None
    to have them chosen. `progress` is told which run is at how many requests.

    Raises ConfigError where no request fits on the device."""
    progress("bounds", 0)
    fitting = [request for request in requests if settings.fits(request)]
    if not fitting:
        raise ConfigError(
            f"all {len(requests):,} requests are longer than the device's pool: raise "
            "--device-tokens, or shorten them with --scale-to."
        )
    runs = page_runs(fitting, settings.page_size)
    whole_gb = sum(runs.lengths) * settings.page_bytes / GIB
    sizes = sweep_sizes(whole_gb, settings.page_bytes / GIB) if sizes is None else sizes
    tokens = max(sum(request.input_tokens for request in fitting), 1)

    def share(pages: int) -> float:
        return pages * settings.page_size / tokens

    def belady(host_gb: float) -> float:
        host_pages = int(host_gb * GIB) // settings.page_bytes
        return share(belady_hits(runs, settings.device_pages + host_pages))

    bounds = Bounds(share(infinite_hits(runs)), {gb: belady(gb) for gb in sizes}, whole_gb)
    outcomes: list[Outcome] = []
    for policy in policies:
        for host_gb in sizes:
            alike = next((run for run in outcomes if run.host_gb == host_gb == 0), None)
            if alike is not None:
                outcomes.append(msgspec.structs.replace(alike, policy=policy))
                continue
            name = f"{policy}, {host_gb:g} GiB"
            chosen = replace(settings, eviction=policy, host_gb=host_gb)
            outcomes.append(simulate(requests, chosen, partial(progress, name)))
    refused = [request.input_tokens for request in requests if not settings.fits(request)]
    return Sweep(len(requests), len(refused), sum(refused), outcomes, bounds)


def write_csv(sweep: Sweep, path: Path) -> None:
    """A row for each run."""
    with path.open("w", newline="") as file:
        rows = [_row(run, sweep.bounds) for run in sweep.runs]
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def _row(run: Outcome, bounds: Bounds) -> dict[str, Any]:
    row = {name: getattr(run, name) for name in _COLUMNS}
    row |= {f"{tier}_share": run.hit_share[tier] for tier in ("device", "host", "total")}
    row |= {
        f"saved_{of}": getattr(run, f"saved_{of}")["total"] for of in ("flops_share", "prefill_s")
    }
    row |= {"loaded_tokens": run.loaded_tokens, "spilled_tokens": run.spilled_tokens}
    row |= {"ttft_mean_s": run.ttft_s["mean"], "infinite_share": bounds.infinite}
    return row | {"belady_share": bounds.belady[run.host_gb]}


_COLUMNS = (
    *("policy", "host_gb", "device_tokens", "requests", "input_tokens"),
    *("refused_requests", "refused_tokens"),
)
