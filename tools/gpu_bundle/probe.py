"""Looks at a bundle from inside, under the target's PyTorch and an H100 that is only claimed.

    python probe.py          (a child process; PYTHONPATH is the bundle's)

Imports what a server's processes import, with `FORBIDDEN` absent as on the target. Prints which
of it was imported by which lines: SGLang tries some of it and goes on without. Ends with
status 1 where a module cannot be imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import json
import sys
import traceback
from pathlib import Path
from typing import Any

FORBIDDEN = ("cutlass", "quack", "deep_gemm", "tilelang")

#: What a server's processes import, some of it only once a request is there.
MODULES = (
    "sglang.launch_server",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.managers.tokenizer_manager",
    "sglang.srt.managers.data_parallel_controller",
    "sglang.srt.model_executor.model_runner",
    "sglang.srt.layers.attention.flashinfer_backend",
    "sglang.srt.layers.attention.flashinfer_mla_backend",
    "sglang.srt.layers.sampler",
    "sglang.srt.models.llama",
    "sglang.srt.models.deepseek_v2",
    "sglang.srt.mem_cache.memory_pool_host",
    "sglang.srt.managers.cache_controller",
    "smg_sglang.engine.seams.plugin",
    "smg_sglang.transfer.cuda",
    "smg_sglang.attention.flashinfer",
)


class Absent(importlib.abc.MetaPathFinder):
    """The finder of files, but for the forbidden: they are not there, as on the target.

    Attributes:
        imported: who imported which of them. Asking whether one is there is not importing it.
    """

    def __init__(self, finder: Any) -> None:
        self._finder = finder
        self.imported: dict[str, set[str]] = {}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".", maxsplit=1)[0] not in FORBIDDEN:
            return self._finder.find_spec(name, path, target)
        stack = traceback.extract_stack()
        if not any("importlib.util" in frame.filename for frame in stack):
            lines = [f for f in stack[:-1] if "importlib" not in f.filename]
            chain = " > ".join(f"{_short(f.filename)}:{f.lineno}" for f in lines[-3:])
            self.imported.setdefault(name, set()).add(chain)
        return None

    def find_distributions(self, *context: Any) -> Any:
        """As `importlib.metadata` asks of finders."""
        return self._finder.find_distributions(*context)


def _short(path: str) -> str:
    return "/".join(Path(path).parts[-3:])


def main() -> int:
    place = sys.meta_path.index(importlib.machinery.PathFinder)
    watch = Absent(sys.meta_path[place])
    sys.meta_path[place] = watch
    failed: dict[str, str] = {}
    for module in MODULES:
        try:
            importlib.import_module(module)
        except BaseException as error:
            failed[module] = "".join(traceback.format_exception(error)[-6:])
    imported = {name: sorted(chains) for name, chains in watch.imported.items()}
    print(json.dumps({"imported": imported, "failed": failed}, indent=1))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
