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
    """The runs of the newest folder that has any: the full ones, or else the quick ones."""
    for folder in sorted(results.glob("*/"), reverse=True):
        for kind in ("full", "quick"):
            if paths := sorted(folder.glob(f"*-{kind}.json")):
                return [json.loads(path.read_text()) for path in paths]
    return []
