"""A model folder as Hugging Face lays it out, appearing all at once."""

import contextlib
import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Dtype = str  # "bfloat16" or "float32", as config.json spells it


def cache_dir() -> Path:
    """Where prepared models live: outside the checkout, so that clones share them."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "smg_sglang"


def ensure_folder(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` in the cache, made by `build(empty folder)` if it is not there yet.

    It appears by one rename, so a folder that exists is whole. Processes that ask for the same
    one at the same time wait for each other; what a killed one left behind is removed.
    """
    folder = cache_dir() / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f".{name}.lock"):
        if not folder.is_dir():
            _build_and_rename(folder, build)
    return folder


def _build_and_rename(folder: Path, build: Callable[[Path], None]) -> None:
    prefix = f".{folder.name}.tmp-"
    for leftover in folder.parent.glob(prefix + "*"):
        shutil.rmtree(leftover, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        work.chmod(0o755)
        build(work)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a file lock; the kernel drops it with the process, so no stale lock can remain."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another process prepares this model; waiting for it.", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(path: Path, tensors: Mapping[str, np.ndarray], dtype: Dtype) -> None:
    """One safetensors file; `tensors` are float32 and are rounded to `dtype`."""
    # Imported here: torch takes seconds, and a folder that is there needs none of it.
    import torch
    from safetensors.torch import save_file

    target = {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]
    converted = {name: torch.tensor(value, dtype=target) for name, value in tensors.items()}
    save_file(converted, path, {"format": "pt"})
    path.chmod(0o644)  # safetensors makes it private, unlike its neighbours
