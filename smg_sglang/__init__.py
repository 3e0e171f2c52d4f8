"""Separated memory and GPU: an SGLang extension that keeps KV pages in host memory."""

__version__ = "0.1.0"

#: The SGLang releases this package was tested against; another one is refused at start.
TESTED_SGLANG = ("0.5.23",)
