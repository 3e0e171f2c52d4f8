"""Wheels from PyPI for the target's Python, kept in a folder between calls."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from tools.gpu_bundle.parts import PLATFORMS, PYTHON


def fetch(requirements: Iterable[str], folder: Path) -> dict[str, Path]:
    """The wheel of each requirement; SystemExit with a sentence where there is none."""
    return {requirement: _wheel(requirement, folder) for requirement in requirements}


def _wheel(requirement: str, folder: Path) -> Path:
    """Each has a folder of its own, so that what is there says what it was asked for as."""
    place = folder / requirement.replace("*", "x")
    found = list(place.glob("*.whl"))
    if not found:
        print(f"  {requirement}", flush=True)
        _download(requirement, place)
        found = list(place.glob("*.whl"))
    return found[0]


def _download(requirement: str, place: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--implementation", "cp", "--python-version", PYTHON]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    command += ["--retries", "10", "--timeout", "60", "--dest", str(place), requirement]
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit(f"pip could not download {requirement} for Python {PYTHON}")
