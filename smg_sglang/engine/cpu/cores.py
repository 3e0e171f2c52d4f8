"""Which CPU cores a process may use, and how the ranks of a server share them."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def usable_cores(cgroup: Path = _CGROUP) -> list[int]:
    """The cores this process may run on, no more than its cgroup's CPU quota pays for.

    More threads than the quota only get throttled together, so a container with a quota of two
    cores on a box of 64 gets the first two of its cores.
    """
    cores = sorted(os.sched_getaffinity(0))
    quota = cpu_quota(cgroup)
    return cores if quota is None else cores[: max(1, math.ceil(quota))]


def cpu_quota(cgroup: Path = _CGROUP) -> float | None:
    """Cores' worth of CPU time that the cgroup (v2 or v1) grants, None where it is unlimited."""
    quota, period = _quota_v2(cgroup) or _quota_v1(cgroup) or ("max", "100000")
    return None if quota in ("max", "-1") else int(quota) / int(period)


def _quota_v2(cgroup: Path) -> tuple[str, str] | None:
    fields = (_read(cgroup / "cpu.max") or "").split()
    return (fields[0], fields[1]) if len(fields) == 2 else None


def _quota_v1(cgroup: Path) -> tuple[str, str] | None:
    quota = _read(cgroup / "cpu" / "cpu.cfs_quota_us")
    period = _read(cgroup / "cpu" / "cpu.cfs_period_us")
    return (quota, period) if quota and period else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def share_cores(cores: Sequence[int], ranks: int) -> list[list[int]]:
    """One group of neighbouring cores a rank; ranks beyond the number of cores share one.

    Every rank gets the same number of cores, so that none waits for another at each layer.
    """
    per_rank = len(cores) // ranks
    if per_rank == 0:
        return [[cores[rank % len(cores)]] for rank in range(ranks)]
    return [list(cores[rank * per_rank : (rank + 1) * per_rank]) for rank in range(ranks)]


def format_binding(groups: Sequence[Sequence[int]]) -> str:
    """The groups as SGLANG_CPU_OMP_THREADS_BIND spells them: "0,1|2,3"."""
    return "|".join(",".join(map(str, group)) for group in groups)


def parse_binding(binding: str) -> list[list[int]]:
    """The inverse of `format_binding`; also reads ranges ("0-3|4-7") and "all" as no group."""
    if binding in ("", "all"):
        return []
    return [_parse_group(group) for group in binding.split("|")]


def _parse_group(group: str) -> list[int]:
    cores: list[int] = []
    for part in filter(None, group.split(",")):
        first, _, last = part.partition("-")
        cores.extend(range(int(first), int(last or first) + 1))
    return cores
