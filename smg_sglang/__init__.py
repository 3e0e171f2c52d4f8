"""Separated memory and GPU: an SGLang extension that keeps KV pages in host memory."""

__version__ = "0.1.0"

#: The SGLang releases this package was tested against; another one is refused at start.
TESTED_SGLANG = ("0.5.23",)


def __getattr__(name: str) -> object:
    # Importing SGLang takes seconds and a GPU driver; the memory server needs neither.
    if name == "Engine":
        from smg_sglang.engine.offline import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
