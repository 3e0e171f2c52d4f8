"""In a prefill worker: an output is let go only when the pages it stands for are in memory.

SGLang sends a request's last output as soon as it is computed, while its pages are still being
copied. The controller takes that output for the word that the decode worker may load them.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

from smg_sglang.engine.options.record import carried
from smg_sglang.phase.requests import Role

logger = logging.getLogger(__name__)

#: Longer than this a hand-off does not wait for memory: the decode worker computes what it misses.
LONGEST_WAIT_S = 5.0


class PublishedOutputs:
    """A thread that sends outputs once all copies submitted before them have ended."""

    def __init__(self, address: str, published: Callable[[float], bool]) -> None:
        """
        Args:
            address: where the controller listens for outputs.
            published: waits, so many seconds at most, until copies have ended. Any thread.
        """
        self._address = address
        self._published = published
        self._waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="smg-published", daemon=True).start()

    def send(self, output: Any) -> None:
        """Scheduler thread; does not block."""
        self._waiting.put(output)

    def _run(self) -> None:
        import zmq
        from sglang.srt.managers.io_struct import sock_send

        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        socket.connect(self._address)
        while True:
            output = self._waiting.get()
            if not self._published(LONGEST_WAIT_S):
                logger.warning("smg: pages were not in memory after %.0f s", LONGEST_WAIT_S)
            sock_send(socket, output)


class _Process:
    """What this worker process is in a split; a process has one cache."""

    worker: dict[str, Any] | None = None
    outputs: PublishedOutputs | None = None


def attach(cache: Any, server_args: Any) -> None:
    """Called in each worker when its cache was made; does nothing but in a split."""
    _Process.worker = carried(server_args).get("worker")
    if _Process.worker is None or _Process.worker["role"] != Role.PREFILL:
        return
    _Process.outputs = PublishedOutputs(
        _Process.worker["outputs"], lambda seconds: _drain(cache, seconds)
    )


def _drain(cache: Any, seconds: float) -> bool:
    tier = cache.host_tier
    return True if tier is None else bool(tier.spills.drain(seconds))


def state() -> dict[str, Any]:
    """What `/server_info` shows of this worker beside its host tier."""
    if _Process.worker is None:
        return {}
    return {"worker": {**_Process.worker, "up": True}}


def around_send_output(
    original: Callable[..., Any], sender: Any, output: Any, *args: Any, **kwargs: Any
) -> Any:
    """Hook on `SenderWrapper.send_output`."""
    if _Process.outputs is None or sender.socket is None or not _is_batch(output):
        return original(sender, output, *args, **kwargs)
    _Process.outputs.send(output)
    return None


def _is_batch(output: Any) -> bool:
    from sglang.srt.managers.io_struct import BatchTokenIDOutput

    return isinstance(output, BatchTokenIDOutput)
