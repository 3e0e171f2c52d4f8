"""Makes `torch.cuda` claim one H100, in each Python that has this folder on its PYTHONPATH.

Compilers and import-time choices ask for the device that a kernel is for, and this machine has
none. Nothing can be launched or allocated on it.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch

GIB = 1 << 30
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * GIB,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    regs_per_multiprocessor=65536,
    L2_cache_size=50 << 20,
    is_integrated=False,
    is_multi_gpu_board=False,
    gcnArchName="",
    uuid="00000000-0000-0000-0000-000000000000",
    pci_bus_id=0,
    pci_device_id=0,
    pci_domain_id=0,
)


def _claim(**claims: Any) -> None:
    for name, value in claims.items():
        setattr(torch.cuda, name, functools.partial(_say, value))


def _say(value: Any, *_: Any, **__: Any) -> Any:
    return value


_claim(
    is_available=True,
    is_initialized=True,
    device_count=1,
    current_device=0,
    get_device_capability=(9, 0),
    get_device_name=PROPERTIES.name,
    get_device_properties=PROPERTIES,
    get_arch_list=["sm_90"],
    is_bf16_supported=True,
    mem_get_info=(78 * GIB, 80 * GIB),
    memory_allocated=0,
    memory_reserved=0,
    max_memory_allocated=0,
    set_device=None,
    synchronize=None,
    empty_cache=None,
    init=None,
    _lazy_init=None,
    manual_seed=None,
    manual_seed_all=None,
    ipc_collect=None,
    reset_peak_memory_stats=None,
)
