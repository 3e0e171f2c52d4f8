"""How much memory this machine, or the container we are in, has."""

from pathlib import Path
from typing import NamedTuple

GIB = 1 << 30


class BoxMemory(NamedTuple):
    """In bytes. `total` is what could ever be used, `available` what is not in use now."""

    total: int
    available: int


def box_memory(root: Path = Path("/")) -> BoxMemory:
    """The smaller of the machine's and of every enclosing cgroup's memory (v2 and v1)."""
    info = _meminfo(root)
    total, available = info["MemTotal"], info.get("MemAvailable", info["MemFree"])
    for limit, used in _cgroup_limits(root):
        total = min(total, limit)
        available = min(available, max(0, limit - used))
    return BoxMemory(total, available)


def _meminfo(root: Path) -> dict[str, int]:
    lines = (root / "proc/meminfo").read_text().splitlines()
    fields = (line.split() for line in lines)
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in fields}


def _cgroup_limits(root: Path) -> list[tuple[int, int]]:
    """(limit, use) of each cgroup we are in that has a limit."""
    found = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = base / path.lstrip("/")
        for directory in (group, *group.parents):
            limit, used = (_read(directory / name).strip() for name in names)
            if limit.isdigit():
                found.append((int(limit), int(used or 0)))
            if directory == base:
                break
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
