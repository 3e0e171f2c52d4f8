"""The result, written line by line, so that a run that is cut off has what it found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Table:
    """`table.txt` for people and `table.jsonl` for programs, in the output folder."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._text, self._lines = out / "table.txt", out / "table.jsonl"

    def row(self, step: str, what: str, figure: str, **raw: Any) -> None:
        """One finding. `raw`: what the figure is made of, for the JSON."""
        line = f"{step:<12} | {what:<44} | {figure}"
        print(line, flush=True)
        with self._text.open("a") as text, self._lines.open("a") as lines:
            text.write(line + "\n")
            found = {"step": step, "what": what, "figure": figure, **raw}
            lines.write(json.dumps(found, default=str) + "\n")
