"""Runs a trace through a simulated server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from smg_sglang.simulate.clock import Clock
from smg_sglang.simulate.settings import Settings
from smg_sglang.simulate.tally import Tally
from smg_sglang.simulate.worker import Worker
from smg_sglang.trace.request import Request


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """Every figure of a run. Tokens, bytes, seconds; shares are of `input_tokens`.

    `ttft_s` has queueing in it and depends on the rates assumed; `saved_prefill_s` is the sum over
    requests of what each would save on an idle device, against a server that caches nothing.
    """

    model: str
    policy: str
    write_policy: str
    device_tokens: int
    host_gb: float
    storage_gb: float
    page_size: int
    host_pages: int
    requests: int
    refused_requests: int
    refused_tokens: int
    input_tokens: int
    output_tokens: int
    hit_tokens: dict[str, int]
    hit_share: dict[str, float]
    prefill_flops: float
    saved_flops_share: dict[str, float]
    loads: int
    loaded_tokens: int
    loaded_bytes: int
    load_s: float
    spills: int
    spilled_tokens: int
    spilled_bytes: int
    spill_s: float
    dropped_tokens: dict[str, int]
    evicted_tokens: dict[str, int]
    ttft_s: dict[str, float]
    saved_prefill_s: dict[str, float]
    assumed: dict[str, float]
    simulated_s: float
    took_s: float


def simulate(
    requests: Sequence[Request],
    settings: Settings,
    progress: Callable[[int], None] = lambda finished: None,
) -> Outcome:
    """Run all of a trace. `progress` is told now and then how many requests have ended."""
    began = time.perf_counter()
    clock, tally = Clock(), Tally(settings)
    worker = Worker(settings, clock, tally)
    _feed(requests, worker, clock)
    steps = 0
    while clock.step():
        steps += 1
        if steps % 1024 == 0:
            progress(tally.finished + tally.refused)
    progress(tally.finished + tally.refused)
    assert tally.finished + tally.refused == len(requests), "requests were left waiting"
    return _outcome(settings, worker, tally, clock.now(), time.perf_counter() - began)


def _feed(requests: Sequence[Request], worker: Worker, clock: Clock) -> None:
    """Let requests arrive: at their times, or each when the one before it has ended."""
    waiting: Iterator[Request] = iter(requests)

    def submit_next() -> None:
        request = next(waiting, None)
        if request is not None:
            clock.at(clock.now(), worker.submit, request)

    if worker.settings.closed:
        worker.on_finish = submit_next
        submit_next()
        return
    scale = worker.settings.time_scale
    for request in requests:
        clock.at(request.arrival_s * scale, worker.submit, request)


def _outcome(
    settings: Settings, worker: Worker, tally: Tally, simulated_s: float, took_s: float
) -> Outcome:
    page, page_bytes = settings.page_size, settings.page_bytes
    hits = dict(tally.hit_tokens)
    total = max(tally.input_tokens, 1)
    shares = {tier: tokens / total for tier, tokens in hits.items()}
    flops = {
        tier: saved / max(tally.prefill_flops, 1.0) for tier, saved in tally.saved_flops.items()
    }
    return Outcome(
        model=settings.model.name,
        policy=settings.eviction,
        write_policy=settings.write_policy,
        device_tokens=settings.device_tokens,
        host_gb=settings.host_gb,
        storage_gb=settings.storage_gb,
        page_size=page,
        requests=tally.requests,
        refused_requests=tally.refused,
        refused_tokens=tally.refused_tokens,
        input_tokens=tally.input_tokens,
        output_tokens=tally.output_tokens,
        hit_tokens=hits,
        hit_share={**shares, "total": sum(shares.values())},
        prefill_flops=tally.prefill_flops,
        saved_flops_share={**flops, "total": sum(flops.values())},
        loads=tally.loads,
        loaded_tokens=tally.loaded_pages * page,
        loaded_bytes=tally.loaded_pages * page_bytes,
        load_s=settings.link_s(tally.loaded_pages),
        ttft_s=tally.ttft(),
        saved_prefill_s={**tally.saved_s, "total": sum(tally.saved_s.values())},
        assumed={
            "tflops": settings.tflops,
            "link_gbps": settings.link_gbps,
            "itl_ms": settings.itl_ms,
            "storage_gbps": settings.storage_gbps,
        },
        simulated_s=simulated_s,
        took_s=took_s,
        **_below(settings, worker),
    )


def _below(settings: Settings, worker: Worker) -> dict[str, Any]:
    """The figures of the host level; all 0 without one."""
    page, host = settings.page_size, worker.host
    evicted = {"device": worker.device.evicted_pages * page, "host": 0, "storage": 0}
    if host is None:
        zeros: dict[str, Any] = dict.fromkeys(
            ("host_pages", "spills", "spilled_tokens", "spilled_bytes", "spill_s"), 0
        )
        return {**zeros, "dropped_tokens": {}, "evicted_tokens": evicted}
    stats = host.books.stats(epoch="", uptime_s=0, malformed=0, strays=0, refused=0)
    evicted["host"] = stats.total.pages_evicted * page
    if host.storage is not None:
        evicted["storage"] = host.storage.evicted * page
    slabs = settings.host_bytes // host.geometry.slab_bytes
    return {
        "host_pages": slabs * host.geometry.pages_per_slab,
        "spills": host.spills,
        "spilled_tokens": host.spilled_pages * page,
        "spilled_bytes": host.spilled_pages * settings.page_bytes,
        "spill_s": host.spill_s,
        "dropped_tokens": {reason: pages * page for reason, pages in host.dropped.items() if pages},
        "evicted_tokens": evicted,
    }
