"""The bundle's Python folder: wheels unpacked, what nothing reaches left out, the project added."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from tools.gpu_bundle import parts

ROOT = Path(__file__).resolve().parents[2]


def unpack(wheels: Iterable[Path], site: Path) -> Counter[str]:
    """Everything but `LEFT_OUT`; bytes that each of its patterns left out."""
    left: Counter[str] = Counter()
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                if (pattern := _left_out(member.filename)) is not None:
                    left[pattern] += member.file_size
                elif not member.is_dir():
                    archive.extract(member, site)
    return left


def unpack_whole(wheels: Iterable[Path], target: Path) -> None:
    """All of them, each time: they are small."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)


def _left_out(name: str) -> str | None:
    if any(fnmatch(name, pattern) for pattern in parts.KEPT):
        return None
    return next((pattern for pattern in parts.LEFT_OUT if fnmatch(name, pattern)), None)


def add_old_libraries(wheel: Path, site: Path) -> None:
    """The compiled parts of an earlier release, under the Python of the present one."""
    with zipfile.ZipFile(wheel) as archive:
        for name in parts.OLD_LIBRARIES:
            archive.extract(name, site)
            _strip(site / name)


def _strip(library: Path) -> None:
    subprocess.run(["strip", "--strip-unneeded", str(library)], check=False)


def add_project(target: Path) -> None:
    """What git tracks of the project, and its metadata, whose entry points make it a plugin."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--", *parts.PROJECT]
    names = subprocess.run(listed, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("bench/results/"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)
    _add_metadata(target)


def add_tokenizer(demo: Path, cache: Path) -> None:
    """The demo model without weights: from it come models of any shape, and it fills a cache that
    is looked at before anything is downloaded."""
    folder = cache / "smg_sglang" / demo.name
    shutil.copytree(demo, folder, ignore=shutil.ignore_patterns("*.safetensors"))


def _add_metadata(target: Path) -> None:
    """A dist-info by hand: entry points and version, from pyproject.toml."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = target / f"{project['name']}-{project['version']}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines: list[str] = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n")
