"""Makes `.venv` with the project and its pinned SGLang in it; run by make, needs nothing installed.

pip's own output for 200 packages is a wall of text, so this shows one line of progress and keeps
the rest in `.venv/set_up.log`. Safe to interrupt and repeat; two at once wait for each other.
"""

import fcntl
import importlib.util
import os
import re
import select
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".ready"
LOG = VENV / "set_up.log"
PROJECT = ROOT / "pyproject.toml"

ATTEMPTS = 3
NETWORK_TROUBLE = re.compile(
    r"timed out|Connection (broken|reset|aborted)|IncompleteRead|ConnectionError|RemoteDisconnected"
    r"|NewConnectionError|Temporary failure in name resolution|incomplete-download|50[234] .*Error",
    re.IGNORECASE,
)


def main() -> None:
    with PROJECT.open() as lock:  # the one file that is there before .venv is
        fcntl.flock(lock, fcntl.LOCK_EX)
        if STAMP.exists() and STAMP.stat().st_mtime >= PROJECT.stat().st_mtime:
            return
        _say("Setting up .venv, once: some gigabytes to download, several minutes.")
        if not _works(PYTHON):
            _make_venv()
        _pip("pip itself", "--upgrade", "pip>=25.1")
        _pip("the project", "--editable", f"{ROOT}[dev]")
        STAMP.touch()


def _works(python: Path) -> bool:
    """False also where .venv outlived the interpreter it was made from."""
    command = [str(python), "-c", "import sys, pip; sys.exit(sys.version_info < (3, 11))"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _make_venv() -> None:
    """Debian keeps ensurepip in a package of its own, so a pip outside may have to step in."""
    command = [sys.executable, "-m", "venv", "--clear", str(VENV)]
    if importlib.util.find_spec("ensurepip") is not None:
        subprocess.run(command, check=True)
    elif importlib.util.find_spec("pip") is not None:
        subprocess.run([*command, "--without-pip"], check=True)
        pip = [sys.executable, "-m", "pip", "--python", str(PYTHON), "install", "pip"]
        subprocess.run(pip, check=True)
    else:
        version = f"python3.{sys.version_info.minor}"
        raise SystemExit(f"{version} cannot make environments: apt install {version}-venv")


def _pip(what: str, *arguments: str) -> None:
    """pip install, tried again after network trouble: what is complete stays in pip's cache."""
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    if what != "pip itself":  # an old pip does not know raw progress
        command += ["--progress-bar", "raw"]
    for attempt in range(1, ATTEMPTS + 1):
        code, tail = _run_with_progress(command)
        if code == 0:
            return
        if not NETWORK_TROUBLE.search(tail) or attempt == ATTEMPTS:
            raise SystemExit(f"{tail}\npip could not install {what}. All it said: {LOG}")
        _say("The network failed; trying again with what is already here.")


def _run_with_progress(command: list[str]) -> tuple[int, str]:
    """Runs pip; returns its exit status and the last lines that are not warnings."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment.setdefault("PIP_DEFAULT_TIMEOUT", "60")
    environment.setdefault("PIP_RETRIES", "10")
    progress, tail = Progress(sys.stderr.isatty()), deque[str](maxlen=15)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )
    assert process.stdout is not None
    with LOG.open("a", encoding="utf-8") as log:
        for line in _lines(process.stdout.fileno(), idle=progress.show):
            if progress.see(line):
                log.write(line + "\n")
                log.flush()
            if line.strip() and not line.startswith(("WARNING", "Progress ")):
                tail.append(line)
    progress.close()
    return process.wait(), "\n".join(tail)


def _lines(descriptor: int, idle: Callable[[], None]) -> Iterator[str]:
    """Lines as they come; calls `idle` about once a second, output or not."""
    rest = b""
    while True:
        if not select.select([descriptor], [], [], 1.0)[0]:
            idle()
            continue
        block = os.read(descriptor, 65536)
        if not block:
            return
        *whole, rest = (rest + block).split(b"\n")
        for line in whole:
            yield line.decode("utf-8", "replace").rstrip("\r")
        idle()


class Progress:
    """What pip is doing, as one line: rewritten on a terminal, else repeated when it says more."""

    def __init__(self, terminal: bool) -> None:
        self._terminal = terminal
        self._start = time.monotonic()
        self._packages = 0
        self._doing = "starting pip"
        self._bytes = ""
        self._installing = False
        self._shown_at = self._start

    def see(self, line: str) -> bool:
        """Takes in a line of pip's; False for byte counts, which no log needs."""
        if found := re.match(r"Progress (\d+) of (\d+)", line):
            done, total = (int(n) / 1e6 for n in found.groups())
            self._bytes = f", {done:.0f} of {total:.0f} MB"
            return False
        self._bytes = ""
        if line.startswith(("Collecting ", "Requirement already satisfied")):
            self._packages += 1
            self._doing = f"resolving, {self._packages} packages so far"
        elif found := re.match(r"\s+Downloading (\S+?)-(\d\S*?)-\S+ \((.*)\)", line):
            self._doing = f"{self._packages} packages, downloading {found[1]} {found[2]}"
        elif line.startswith("Installing collected packages"):
            self._doing = f"installing {line.count(',') + 1} packages"
            self._installing = True
        elif line.startswith("Successfully installed"):
            self._doing = "installed"
        return True

    def show(self) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self._start), 60)
        # pip is silent for minutes while it installs; what appears in .venv tells how far it is.
        done = f", {_installed()} there" if self._installing else ""
        text = f"[{minutes}:{seconds:02}] {self._doing}{self._bytes}{done}"
        if self._terminal:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self._shown_at > 10:
            self._shown_at = time.monotonic()
            _say(text)

    def close(self) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _installed() -> int:
    return sum(1 for _ in VENV.glob("lib/python3*/site-packages/*.dist-info"))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
