"""The packages that a server needs, without importing them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, entry_points, version

from smg_sglang import TESTED_SGLANG, __version__
from smg_sglang.doctor.finding import Finding, advice, wrong

_NEEDED = ("torch", "msgspec", "numpy", "pyzmq", "psutil", "prometheus-client", "xxhash")


def look_at_software(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Python, SGLang, what we import, and whether SGLang will find us."""
    python = ".".join(map(str, sys.version_info[:3]))
    yield (
        Finding("Python", python)
        if sys.version_info >= (3, 11)
        else wrong("Python", python, "use Python 3.11 or newer")
    )
    yield _sglang()
    for name in _NEEDED:
        found = _version(name)
        yield Finding(name, found) if found else wrong(name, "not installed", f"pip install {name}")
    yield _plugin(environment)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _sglang() -> Finding:
    found, tested = _version("sglang"), ", ".join(TESTED_SGLANG)
    if found is None:
        return wrong("SGLang", "not installed", f"pip install sglang=={TESTED_SGLANG[-1]}")
    if found in TESTED_SGLANG:
        return Finding("SGLang", f"{found} (tested)")
    return wrong(
        "SGLang",
        f"{found}, and {tested} was tested",
        f"pip install sglang=={TESTED_SGLANG[-1]}, or try yours with --smg-allow-untested-sglang",
    )


def _plugin(environment: Mapping[str, str]) -> Finding:
    what = f"smg_sglang {__version__} as SGLang's plugin"
    if not any(point.name == "smg" for point in entry_points(group="sglang.srt.plugins")):
        return wrong(what, "not installed", "pip install . where smg_sglang is, into this Python")
    allowed = {name.strip() for name in environment.get("SGLANG_PLUGINS", "").split(",")} - {""}
    if allowed and "smg" not in allowed:
        return wrong(
            what, f"shut out by SGLANG_PLUGINS={','.join(sorted(allowed))}", "add smg to it"
        )
    enabled = environment.get("SMG_ENABLE", "0")
    if enabled.lower() in ("1", "true"):
        return advice(
            what,
            f"switched on by SMG_ENABLE={enabled}",
            "nothing, if every sglang.Engine here shall use it; else unset SMG_ENABLE",
        )
    return Finding(what, "found")
