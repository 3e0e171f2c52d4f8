"""Traces of requests, as published: who asked when, with which prefix. Numpy only."""

from smg_sglang.trace.reader import TraceFormat, load_trace, read_trace
from smg_sglang.trace.request import Request

__all__ = ["Request", "TraceFormat", "load_trace", "read_trace"]
