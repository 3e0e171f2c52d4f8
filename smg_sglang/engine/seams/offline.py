"""`smg_sglang.engine.Engine`: SGLang's offline engine with our keyword arguments."""

from __future__ import annotations

from typing import Any

from sglang.srt.entrypoints.engine import Engine as SglangEngine
from sglang.srt.server_args import ServerArgs

from smg_sglang.engine.options.command_line import split_kwargs
from smg_sglang.engine.options.configuration import configure


def _server_args(**kwargs: Any) -> ServerArgs:
    theirs, ours = split_kwargs(kwargs)
    server_args = ServerArgs(**theirs)
    if ours is not None:
        configure(server_args, ours, origin="engine")
    return server_args


class Engine(SglangEngine):
    """`sglang.Engine` that also takes `enable_smg=True` and the `smg_*` arguments.

    The names are those of the flags: `smg_host_gb=8` for `--smg-host-gb 8`. Raises ConfigError
    for a wrong value, before anything is started.
    """

    server_args_class = staticmethod(_server_args)
