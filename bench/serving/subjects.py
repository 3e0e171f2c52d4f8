"""The servers that are compared: started together, asked one at a time."""

from __future__ import annotations

import os
import shlex
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from tools.sglang_server import SglangServer

PAGE_SIZE = 16
HICACHE_PLUGIN = Path(__file__).parent / "hicache"
STOCK, SMG, HICACHE = "stock", "smg", "hicache"


def server_args(subject: str, options: Namespace) -> list[str]:
    """Flags of one server; only what is compared differs."""
    args = [
        *("--dtype", options.dtype),
        *("--max-total-tokens", str(options.pool_tokens)),
        *("--page-size", str(PAGE_SIZE)),
        *("--random-seed", "1"),
        *("--log-level", "warning"),
    ]
    if options.attention_backend:
        args += ["--attention-backend", options.attention_backend]
    if subject == SMG:
        args += ["--enable-smg", "--smg-host-gb", str(options.host_gb)]
    if subject == HICACHE:
        args += ["--enable-hierarchical-cache", "--hicache-size", str(round(options.host_gb))]
        # On a CPU the plugin replaces these; a GPU copies with SGLang's own choice.
        if attention_backend(None):
            args += ["--hicache-io-backend", "direct", "--hicache-mem-layout", "layer_first"]
    return args + shlex.split(options.server_args)


def start_smg(options: Namespace, name: str, more: Sequence[str]) -> SglangServer:
    """A server of ours with `more` flags, to be compared with ours; its log is in OUT/logs."""
    args = [
        *("--enable-smg", "--smg-host-gb", str(options.host_gb), "--dtype", options.dtype),
        *("--log-level", "warning"),
        *shlex.split(options.server_args),
    ]
    if backend := attention_backend(None):
        args += ["--attention-backend", backend]
    logs = options.out.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{name.replace(',', '').replace(' ', '-')}.log"
    return SglangServer(options.model_path, [*args, *more], log=log)


def server_env(subject: str) -> dict[str, str]:
    """HiCache wants CUDA; a plugin that only its process sees lets it run without."""
    if subject != HICACHE:
        return {}
    paths = (str(HICACHE_PLUGIN), os.environ.get("PYTHONPATH"))
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


@contextmanager
def started(starts: Mapping[str, Callable[[], SglangServer]]) -> Iterator[dict[str, SglangServer]]:
    """All servers ready at once; idle ones sleep. Stopped at the end of the block."""
    with ExitStack() as stack:
        servers = {}
        for name, start in starts.items():
            servers[name] = start()
            stack.callback(servers[name].stop)
        for server in servers.values():
            server.wait_ready()
        yield servers


@contextmanager
def running(
    subjects: list[str], options: Namespace, logs: Path
) -> Iterator[dict[str, SglangServer]]:
    """Servers to be compared with each other, by `started`."""
    logs.mkdir(parents=True, exist_ok=True)

    def start(subject: str) -> SglangServer:
        return SglangServer(
            options.model_path,
            server_args(subject, options),
            server_env(subject),
            logs / f"{subject}.log",
        )

    with started({subject: partial(start, subject) for subject in subjects}) as servers:
        yield servers


def attention_backend(asked: str | None) -> str:
    """For all servers: as asked, else ours on a CPU, else "", SGLang's own choice."""
    from smg_sglang.engine.cpu.activation import accelerator_available

    if asked is not None:
        return asked
    return "" if accelerator_available() else "smg"
