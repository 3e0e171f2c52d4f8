"""One benchmark as a child process: whatever becomes of it, the others run."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

GRACE_S = 40.0


@dataclass(frozen=True)
class Outcome:
    """How a child ended.

    Attributes:
        status: "ok", "failed", "timed out" or "not run".
        detail: for people; empty where all is well.
    """

    status: str
    detail: str = ""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return self.status == "ok"


def run(
    command: Sequence[str], log: Path, timeout_s: float, env: Mapping[str, str] | None = None
) -> Outcome:
    """Run a command to its end or its timeout; its output goes to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with log.open("wb") as output:
        child = psutil.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}
        )
        try:
            code = child.wait(timeout=timeout_s)
        except psutil.TimeoutExpired:
            code = None
        finally:
            stop(child)
    seconds = time.monotonic() - began
    if code == 0:
        return Outcome("ok", seconds=seconds)
    if code is None:
        return Outcome("timed out", f"after {timeout_s:.0f} s; {tail(log)}", seconds)
    return Outcome("failed", f"exit code {code}; {tail(log)}", seconds)


def stop(child: psutil.Popen, grace_s: float = GRACE_S) -> None:
    """SIGTERM to the child, which stops its servers; what is left of its family is ended, too."""
    try:
        family = [child, *child.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    child.terminate()
    _, alive = psutil.wait_procs(family, timeout=grace_s / 2)
    for process in alive:
        process.terminate()
    _, alive = psutil.wait_procs(alive, timeout=grace_s / 4)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=grace_s / 4)


def tail(log: Path) -> str:
    """The last line that says something, and where the rest is."""
    said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"{said[-1][:200] if said else 'no output'} (all of it: {log})"
