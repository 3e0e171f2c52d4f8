"""SGLang as it is installed, and as it would be with our patches: single modules of either.

Modules are executed from source under their own names, but not put in place of the real ones, so
that what one test does to them no other test sees.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

VERSION = "0.5.23"
FOLDER = Path(__file__).parents[2] / "patches" / f"sglang-{VERSION}"
PATCHES = sorted(FOLDER.glob("*.patch"))


@lru_cache(maxsize=1)
def installed() -> Path:
    """The folder that the wheel puts `sglang/` in."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parents[1]


def files_of(patch: Path) -> list[Path]:
    """Files that a patch changes or adds, from the folder that holds `sglang/`."""
    names = [line[6:] for line in patch.read_text().splitlines() if line.startswith("+++ b/")]
    return [Path(name).relative_to("python") for name in names]


def apply(patches: list[Path], folder: Path) -> Path:
    """Copy what the patches touch to `folder`, apply them, return the folder of `sglang/`."""
    python = folder / "python"
    for name in {name for patch in patches for name in files_of(patch)}:
        if (installed() / name).exists():
            (python / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(installed() / name, python / name)
    for patch in patches:
        # Outside any repository git applies to plain files; `--verbose` names what it did.
        subprocess.run(
            ["git", "apply", "--verbose", str(patch)],
            cwd=folder,
            env=os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)},
            check=True,
            capture_output=True,
            text=True,
        )
    return python


class Source:
    """Modules executed from one folder, and from the installed package where it lacks them."""

    def __init__(self, folder: Path, monkeypatch: Any) -> None:
        self.folder = folder
        self._monkeypatch = monkeypatch

    def path(self, name: str) -> Path:
        file = Path(*name.split(".")).with_suffix(".py")
        own = self.folder / file
        return own if own.exists() else installed() / file

    def module(self, name: str) -> ModuleType:
        """A fresh module; other fresh modules find it under `name` until the test ends."""
        if (installed() / Path(*name.split("."))).with_suffix(".py").exists():
            # Whatever else the real one imports must not find ours in its place.
            importlib.import_module(name)
        module = ModuleType(name)
        module.__file__ = str(self.path(name))
        module.__package__ = name.rpartition(".")[0]
        self._monkeypatch.setitem(sys.modules, name, module)
        exec(compile(self.path(name).read_text(), module.__file__, "exec"), vars(module))
        return module

    def function(self, name: str, qualname: str, **names: Any) -> Callable[..., Any]:
        """One function alone. `names` are the globals that matter; the others do nothing."""
        tree: Any = _parsed(self.path(name).read_text())
        for part in qualname.split("."):
            tree = next(node for node in tree.body if getattr(node, "name", None) == part)
        tree.decorator_list = []
        alone = ast.Module([_annotations(), tree], type_ignores=[])
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        space = {name: MagicMock() for name in used - set(dir(builtins))} | names
        exec(compile(ast.fix_missing_locations(alone), str(self.path(name)), "exec"), space)
        return space[qualname.rpartition(".")[2]]


@lru_cache(maxsize=8)
def _parsed(source: str) -> ast.Module:
    """The scheduler's 5,000 lines take a fifth of a second."""
    return ast.parse(source)


def _annotations() -> ast.stmt:
    return ast.parse("from __future__ import annotations").body[0]
