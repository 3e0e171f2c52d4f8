"""The only package that imports SGLang. Each room says who calls it and what it may touch.

`from smg_sglang.engine import Engine` is SGLang's offline engine with our keyword arguments.
"""

from __future__ import annotations


def __getattr__(name: str) -> object:
    # SGLang takes seconds to import, and its plugin loader imports modules of this package.
    if name == "Engine":
        from smg_sglang.engine.seams.offline import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
