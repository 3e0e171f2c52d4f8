"""One JSON file a run, in a folder a machine and day; never changed once written."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
Record = dict[str, Any]


def machine_name(machine: dict[str, Any]) -> str:
    """Short, for a folder: `amd-epyc-7763-2-cores`, or the GPU's name."""
    name = machine.get("gpu") or re.sub(
        r"\(.*?\)|@.*|\b(processor|cpu)\b", "", machine["cpu"], flags=re.I
    )
    return re.sub(r"[^a-z0-9]+", "-", f"{name} {machine['cores']} cores".lower()).strip("-")


def append(record: Record, results: Path = RESULTS) -> Path:
    """Write a record where none is yet; its path."""
    began = datetime.fromisoformat(record["machine"]["date"])
    folder = results / f"{began:%Y-%m-%d}-{machine_name(record['machine'])}"
    folder.mkdir(parents=True, exist_ok=True)
    kind = "quick" if record["quick"] else "full"
    path = folder / f"{began:%H%M%S}-{kind}.json"
    with path.open("x") as file:
        file.write(json.dumps(record, indent=1) + "\n")
    return path


def latest(results: Path = RESULTS) -> list[Record]:
    """The runs of the newest day and machine that has any: the full ones, else the quick ones."""
    paths = [path for path in results.glob("*/*.json") if _kind(path) in ("full", "quick")]
    if not paths:
        return []
    newest = max(paths, key=_when).parent
    for kind in ("full", "quick"):
        if found := sorted(path for path in newest.glob("*.json") if _kind(path) == kind):
            return [json.loads(path.read_text()) for path in found]
    return []


def _kind(path: Path) -> str:
    return path.stem.partition("-")[2]


def _when(path: Path) -> tuple[str, str]:
    """Day and time of day."""
    return path.parent.name[:10], path.stem
