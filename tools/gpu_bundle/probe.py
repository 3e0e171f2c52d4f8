"""Looks at a bundle from inside: its Python, the target's PyTorch, and an H100 that is only claimed.

    python probe.py KERNELS_DIR MODEL...          (a child process; PYTHONPATH is the bundle's)

Imports what a server imports, builds each model and runs a prefill, a decode and the sampler with
kernels that compute nothing. What of `FORBIDDEN` is asked for is told with the line that asked,
and each kernel that is asked for and not in KERNELS_DIR. Ends with status 1 if there is any.
"""

from __future__ import annotations

import importlib
import importlib.abc
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


class Watch(importlib.abc.MetaPathFinder):
    """Refuses the forbidden, as on the target, and remembers who asked."""

    def __init__(self) -> None:
        self.asked: dict[str, list[str]] = {}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] not in FORBIDDEN:
            return
        frames = [f for f in traceback.extract_stack()[:-1] if "importlib" not in f.filename]
        chain = [f"{_short(f.filename)}:{f.lineno}" for f in frames[-5:]]
        self.asked.setdefault(name, []).append(" > ".join(chain))
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _short(path: str) -> str:
    return path.split("site-packages/")[-1].split("/site/")[-1]


def main(arguments: list[str]) -> int:
    watch = Watch()
    sys.meta_path.insert(0, watch)
    failed: dict[str, str] = {}
    for module in MODULES:
        try:
            importlib.import_module(module)
        except BaseException as error:
            failed[module] = "".join(traceback.format_exception(error)[-6:])
    print(json.dumps({"asked": watch.asked, "failed": failed}, indent=1))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
