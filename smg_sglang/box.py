"""How much memory this machine, or the container we are in, has."""

import logging
from pathlib import Path
from typing import NamedTuple

from smg_sglang.errors import ConfigError

log = logging.getLogger(__name__)

GIB = 1 << 30
MIN_HOST_BYTES = 1 << 20


class BoxMemory(NamedTuple):
    """In bytes. `total` is what could ever be used, `available` what is not in use now."""

    total: int
    available: int


def box_memory(root: Path = Path("/")) -> BoxMemory:
    """The smaller of the machine's and of every enclosing cgroup's memory (v2 and v1).

    Page cache that the kernel drops when memory is wanted counts as available.
    """
    info = _meminfo(root)
    total, available = info["MemTotal"], info.get("MemAvailable", info["MemFree"])
    for limit, used in _cgroup_limits(root):
        total = min(total, limit)
        available = min(available, max(0, limit - used))
    return BoxMemory(total, available)


def check_host_bytes(host_bytes: int) -> None:
    """Raises ConfigError if this box or container can never have that much; warns if not now.

    Only a warning, because a server that is restarted may find its predecessor's arena still in
    use by leases, which end soon.
    """
    box = box_memory()
    if host_bytes < MIN_HOST_BYTES:
        raise ConfigError(f"host memory of {host_bytes} bytes is too small: give 1 MiB at least")
    if host_bytes > box.total:
        raise ConfigError(
            f"host memory of {host_bytes / GIB:.1f} GiB was asked for, but this machine (or "
            f"container) has {box.total / GIB:.1f} GiB: lower --host-gb"
        )
    if host_bytes > box.available:
        log.warning(
            "host memory of %.1f GiB was asked for, but only %.1f GiB are free now",
            host_bytes / GIB,
            box.available / GIB,
        )


def _meminfo(root: Path) -> dict[str, int]:
    lines = (root / "proc/meminfo").read_text().splitlines()
    fields = (line.split() for line in lines)
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in fields}


def _cgroup_limits(root: Path) -> list[tuple[int, int]]:
    """(limit, use without page cache) of each cgroup we are in that has a limit."""
    found = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
            cache = "inactive_file"
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            cache = "total_inactive_file"
        else:
            continue
        group = base / path.lstrip("/")
        for directory in (group, *group.parents):
            limit, used = (_read(directory / name).strip() for name in names)
            if limit.isdigit():
                found.append((int(limit), max(0, int(used or 0) - _stat(directory, cache))))
            if directory == base:
                break
    return found


def _stat(group: Path, field: str) -> int:
    """A field of the cgroup's memory.stat, in bytes; 0 if it is not there."""
    for line in _read(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == field:
            return int(value)
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
