"""What the kernel, the container and the shell allow."""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

from smg_sglang.box import GIB, BoxMemory, box_memory
from smg_sglang.doctor.finding import Finding, advice, wrong
from smg_sglang.errors import ConfigError
from smg_sglang.memory.address import Address

MIN_USEFUL_GB = 1.0
_FEW_FILES = 1024


def look_at_memory(root: Path = Path("/")) -> Iterator[Finding]:
    """DRAM, and the container's share of it."""
    box = box_memory(root)
    machine = _machine_bytes(root)
    found = f"{box.available / GIB:.1f} GiB free of {box.total / GIB:.1f}"
    if box.available < MIN_USEFUL_GB * GIB:
        yield wrong("memory", found, "free some: a host tier needs a GiB at least to be of use")
    else:
        yield Finding("memory", found)
    yield _container(box, machine)
    yield from _overcommit(root)
    yield _huge_pages(root)


def _machine_bytes(root: Path) -> int:
    first = (root / "proc/meminfo").read_text().splitlines()[0]
    return int(first.split()[1]) * 1024


def _container(box: BoxMemory, machine: int) -> Finding:
    if box.total >= machine:
        return Finding("container limit", "none")
    found = f"{box.total / GIB:.1f} GiB, of the machine's {machine / GIB:.1f}"
    if box.total < machine / 2:
        return advice(
            "container limit", found, "raise it (docker run --memory, resources.limits.memory)"
        )
    return Finding("container limit", found)


def _overcommit(root: Path) -> Iterator[Finding]:
    if _read(root / "proc/sys/vm/overcommit_memory") == "2":
        yield advice(
            "vm.overcommit_memory",
            "2: memory counts when it is mapped, not when it is used",
            "sysctl vm.overcommit_memory=0, or choose --smg-host-gb within the commit limit",
        )


def _huge_pages(root: Path) -> Finding:
    what = "huge pages for shared memory"
    text = _read(root / "sys/kernel/mm/transparent_hugepage/shmem_enabled")
    chosen = text.partition("[")[2].partition("]")[0] or "not offered by this kernel"
    if chosen in ("never", "deny"):
        return advice(
            what,
            f"{chosen}: memory is prepared 4 KiB at a time",
            "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled, as root; it only "
            "makes the first use of each page faster",
        )
    return Finding(what, chosen)


def look_at_limits(host_bytes: int, *, pins: bool) -> Iterator[Finding]:
    """The shell's limits. `pins`: whether `host_bytes` are to be page-locked."""
    yield _files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    yield _locked(locked, host_bytes, pins=pins)
    yield _shared_memory()
    yield _sockets()


def _files(soft: int) -> Finding:
    if 0 <= soft < _FEW_FILES:
        return advice("open files (ulimit -n)", f"{soft}", "ulimit -n 65536")
    return Finding("open files (ulimit -n)", _limit(soft))


def _locked(soft: int, host_bytes: int, *, pins: bool) -> Finding:
    what = "locked memory (ulimit -l)"
    found = _limit(soft) if soft < 0 else f"{soft / GIB:.2f} GiB"
    if pins and 0 <= soft < host_bytes:
        return advice(
            what,
            found,
            "ulimit -l unlimited (docker run --ulimit memlock=-1), if the server's log says that "
            "the driver page-locks a part only; the rest is copied through a staging buffer",
        )
    return Finding(what, found)


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY or value < 0 else f"{value:,}"


def _shared_memory() -> Finding:
    what = "sealed shared memory (memfd)"
    try:
        os.close(os.memfd_create("smg-doctor", os.MFD_ALLOW_SEALING))
    except OSError as error:
        return wrong(what, str(error), "allow memfd_create in the container's seccomp profile")
    return Finding(what, "can be had")


def _sockets() -> Finding:
    what = "directory for sockets"
    try:
        with tempfile.TemporaryDirectory(prefix="smg-doctor-"):
            address = Address.default()
    except (OSError, ConfigError) as error:
        return wrong(what, str(error), "set TMPDIR to a short directory that you may write to")
    return Finding(what, f"{tempfile.gettempdir()}; `smg_sglang memory` uses {address}")


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
