"""The archive, and the report that says what is in it and what is not."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from tools.gpu_bundle.parts import LIMIT_MIB
from tools.gpu_bundle.patches import PATCHES

NAME = "smg-bundle"


def write(folder: Path, archive: Path) -> int:
    """`folder` as `archive` (tar.xz), with the same bytes for the same files; its size."""
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for path in sorted(folder.rglob("*")):
            if not path.is_dir():
                tar.add(path, f"{NAME}/{path.relative_to(folder)}", filter=_plain)
    return archive.stat().st_size


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = "root"
    info.mtime = 0
    return info


def describe(folder: Path, left: Mapping[str, int]) -> str:
    """Megabytes by part before compression, what was left out, what was changed."""
    sizes: Counter[str] = Counter()
    for path in folder.rglob("*"):
        if path.is_file():
            sizes["/".join(path.relative_to(folder).parts[:2])] += path.stat().st_size
    lines = ["In it, MB before compression:"]
    lines += [f"  {size / 1e6:8.1f}  {name}" for name, size in sizes.most_common(12)]
    lines += ["Left out of its packages:"]
    lines += [f"  {size / 1e6:8.1f}  {name}" for name, size in Counter(left).most_common()]
    lines += ["Changed in it, and only there:"]
    lines += [f"  {patch.file}: {patch.why}" for patch in PATCHES]
    return "\n".join(lines) + "\n"


def size_trouble(size: int) -> str | None:
    """A sentence if the archive is larger than may be sent."""
    if size <= LIMIT_MIB << 20:
        return None
    return f"the archive has {size / (1 << 20):.1f} MiB, more than {LIMIT_MIB}"
