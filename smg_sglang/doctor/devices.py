"""Devices, and how fast bytes move between them and host memory. Measures; takes a second or two.

The CUDA half is written but has not run on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch

from smg_sglang.doctor.finding import Finding, advice, first_line, wrong
from smg_sglang.doctor.link import Link

_REPEATS = 7
_MOST_BYTES = 256 << 20
#: Below this a load from host memory is hardly faster than to compute the tokens again.
_SLOW_LINK_GBPS = 2.0
_PORTABLE_AND_MAPPED = 3


def cuda_available() -> bool:
    """Whether a server would run on CUDA."""
    return bool(torch.cuda.is_available())


def look_at_devices() -> Iterator[Finding]:
    """What torch sees."""
    if not cuda_available():
        if any(Path("/dev").glob("nvidia[0-9]*")):
            yield wrong(
                "accelerator",
                f"an NVIDIA device that torch {torch.__version__} cannot use",
                "install a torch that suits the driver (nvidia-smi), or give the container the "
                "device (docker run --gpus all)",
            )
            return
        built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
        told = f"none; {built}, and no CUDA device is visible" if torch.version.cuda else "none"
        yield Finding("accelerator", f"{told}: SGLang runs on our CPU platform")
        yield Finding("CPU threads", f"{torch.get_num_threads()}")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found = f"{properties.name}, {properties.total_memory / (1 << 30):.0f} GiB"
        yield Finding(f"cuda:{index}", found)


def measure_links(available_bytes: int) -> list[Link]:
    """Each CUDA device's link, or the CPU's memcpy where there is none.

    Args:
        available_bytes: host memory that is free; an eighth of it is used at most.
    """
    size = max(1 << 12, min(_MOST_BYTES, available_bytes // 8))
    if not cuda_available():
        return [_cpu_link(size)]
    return [_cuda_link(index, size) for index in range(torch.cuda.device_count())]


def judge(link: Link) -> Iterator[Finding]:
    """What the figures of a link mean."""
    found = f"{link.to_device_gbps:.1f} GB/s to the device, {link.to_host_gbps:.1f} GB/s from it"
    what = f"link, {link.device}"
    slowest = min(link.to_device_gbps, link.to_host_gbps)
    if slowest < _SLOW_LINK_GBPS:
        yield advice(
            what,
            found,
            "see that nothing else uses the memory bus (or the PCIe slot has all its lanes): "
            "host hits are hardly faster than computing",
        )
    else:
        yield Finding(what, found)
    how = "page-locking" if link.device.startswith("cuda") else "first use of memory"
    yield Finding(f"{how}, {link.device}", f"{link.prepare_gbps:.1f} GB/s")


def try_to_measure(available_bytes: int) -> tuple[list[Link], list[Finding]]:
    """The links and what they mean; a device that refuses is a finding, not an error."""
    try:
        links = measure_links(available_bytes)
    except (RuntimeError, OSError, MemoryError) as error:
        found = f"could not be measured: {first_line(error)}"
        return [], [wrong("link", found, "see that the device is free")]
    return links, [finding for link in links for finding in judge(link)]


def _cpu_link(size: int) -> Link:
    memory = np.empty(size, np.uint8)  # not used yet, so not there yet
    prepare_s = _seconds(lambda: memory.fill(1))
    pool = np.ones(size, np.uint8)
    to_device = _gbps(size, lambda: np.copyto(pool, memory))
    to_host = _gbps(size, lambda: np.copyto(memory, pool))
    return Link("cpu", to_device, to_host, size / prepare_s / 1e9)


def _cuda_link(index: int, size: int) -> Link:
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    host = torch.ones(size, dtype=torch.uint8)
    pool = torch.empty(size, dtype=torch.uint8, device=device)
    runtime = torch.cuda.cudart()

    def lock() -> None:
        error = int(runtime.cudaHostRegister(host.data_ptr(), size, _PORTABLE_AND_MAPPED))
        if error:
            raise RuntimeError(f"the driver refused to page-lock {size} bytes (CUDA error {error})")

    prepare_s = _seconds(lock)
    try:
        to_device = _gbps(size, lambda: _copy(pool, host))
        to_host = _gbps(size, lambda: _copy(host, pool))
    finally:
        runtime.cudaHostUnregister(host.data_ptr())
    return Link(f"cuda:{index}", to_device, to_host, size / prepare_s / 1e9)


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()


def _gbps(size: int, copy: Callable[[], object]) -> float:
    copy()
    return size / median(_seconds(copy) for _ in range(_REPEATS)) / 1e9


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
