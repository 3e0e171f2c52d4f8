"""Builds the C kernel with the machine's compiler, once for each instruction set that is used.

The result lies in `$XDG_CACHE_HOME/smg_sglang/kernels` (or `~/.cache/...`) under a name made of the
sources and the flags, so that what lies there is never out of date. Builds at the same time do no
harm: each writes its own file and renames it. A file ends with a digest of what is before it, which
loaders do not mind: to load one that a crash left cut off would end the process. Nothing is fetched
from anywhere.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent
MAIN = "pages.c"
FLAGS = (
    "-O3",
    "-std=gnu11",
    "-Wall",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-fPIC",
    "-shared",
    "-pthread",
)
LIBRARIES = ("-lm",)
SECONDS = 120
_DIGEST = hashlib.sha256().digest_size

_AVX512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "f16c"})


class BuildError(Exception):
    """The kernel could not be built; the message is one line, for people."""


@dataclass(frozen=True)
class Variant:
    """The kernel for an instruction set.

    width: floats a vector. machine: as `platform.machine` says, or any. needs: what the CPU must
    have, as Linux names it; the compiler's flags are named alike.
    """

    name: str
    width: int
    machine: str = ""
    needs: frozenset[str] = frozenset()

    @property
    def flags(self) -> list[str]:
        """Without those that all variants have."""
        on = [] if self.machine == "aarch64" else sorted(self.needs)
        return [f"-DWIDTH={self.width}", *(f"-m{flag.replace('_', '')}" for flag in on)]

    def runs_on(self, machine: str, has: frozenset[str]) -> bool:
        return self.machine in {"", machine} and self.needs <= has


#: The fastest first.
VARIANTS = (
    Variant("avx512-bf16", 16, "x86_64", _AVX512 | {"avx512_bf16"}),
    Variant("avx512", 16, "x86_64", _AVX512),
    Variant("avx2", 8, "x86_64", frozenset({"avx2", "fma", "f16c"})),
    Variant("neon", 4, "aarch64", frozenset({"asimd"})),
    Variant("portable", 4),
)


def runnable() -> list[Variant]:
    """The variants that this CPU runs, the fastest first."""
    machine, has = platform.machine(), cpu_flags()
    return [variant for variant in VARIANTS if variant.runs_on(machine, has)]


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What Linux says the first CPU has; nothing where it does not say."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in {"flags", "Features"}:
            return frozenset(value.split())
    return frozenset()


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "smg_sglang" / "kernels"


def built(variant: Variant, folder: Path | None = None, compiler: str | None = None) -> Path:
    """The variant's library, built where it is not there yet: some seconds.

    folder: the cache's by default; where that cannot be written, a folder that only this process
    knows. compiler: `$CC`, or the first of cc, gcc and clang, by default.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    folder = folder or cache_folder()
    path = folder / f"pages-{variant.name}-{_key(variant)}.so"
    if not (_is_ours(folder) and _is_whole(path)):
        path = _writable(folder) / path.name
        _compile(compiler or find_compiler(), variant, path)
    return path


def find_compiler() -> str:
    """Raises BuildError where there is none."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and shutil.which(name):
            return name
    raise BuildError("no C compiler was found (cc, gcc or clang, or the one that CC names)")


def command(compiler: str, variant: Variant, output: Path, extra: Sequence[str] = ()) -> list[str]:
    """How the variant is built."""
    return [
        compiler,
        *FLAGS,
        *variant.flags,
        *extra,
        str(SOURCES / MAIN),
        "-o",
        str(output),
        *LIBRARIES,
    ]


def _key(variant: Variant) -> str:
    digest = hashlib.sha256(repr((FLAGS, variant.flags, LIBRARIES)).encode())
    digest.update(platform.machine().encode())
    for path in sorted(SOURCES.glob("*.[ch]")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:20]


def _is_whole(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-_DIGEST]).digest() == content[-_DIGEST:]


def _is_ours(folder: Path) -> bool:
    """Whether nobody else can have put a library there."""
    try:
        found = folder.stat()
    except OSError:
        return False
    return found.st_uid == os.getuid() and not found.st_mode & 0o022


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        pass
    if _is_ours(folder) and os.access(folder, os.W_OK):
        return folder
    return Path(tempfile.mkdtemp(prefix="smg-kernels-"))


def _compile(compiler: str, variant: Variant, path: Path) -> None:
    number, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    os.close(number)
    output = Path(name)
    try:
        _run(command(compiler, variant, output))
        with output.open("r+b") as file:
            file.write(hashlib.sha256(file.read()).digest())
        output.rename(path)
    finally:
        output.unlink(missing_ok=True)


def _run(words: list[str]) -> None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{words[0]} did not run: {error}") from error
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
        raise BuildError(f"{words[0]} failed: {said}")
