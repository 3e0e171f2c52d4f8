"""Hints without a request: the message to the workers, and their answer.

As SGLang has them for other orders to a cache (`patches/sglang-0.5.23/0014`); until then they are
made known to its sockets by `hook_custom_types`, in each process that reads them.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.io_struct import BaseReq, hook_custom_types
from sglang.srt.managers.kv_hints import KvHintsEnvelope


class KvHintsReqInput(BaseReq, kw_only=True):  # type: ignore[call-arg]
    """Hints about the prefix of these tokens."""

    input_ids: list[int]
    kv_hints: KvHintsEnvelope
    extra_key: str | None = None
    cache_salt: str | None = None


class KvHintsReqOutput(BaseReq, kw_only=True):  # type: ignore[call-arg]
    """What became of each action; "pending" where that is not known yet."""

    outcomes: list[str]


def register() -> None:
    """Make the messages known to SGLang's sockets in this process; idempotent."""
    hook_custom_types(KvHintsReqInput, KvHintsReqOutput)


def after_init_request_dispatcher(result: Any, scheduler: Any) -> None:
    """Hook on `Scheduler`: it answers our message, too."""
    from sglang.utils import TypeBasedDispatcher

    def take(message: KvHintsReqInput) -> KvHintsReqOutput:
        take_kv_hints = getattr(scheduler.tree_cache, "take_kv_hints", None)
        outcomes = [] if take_kv_hints is None else take_kv_hints(message)
        return KvHintsReqOutput(outcomes=outcomes)

    scheduler._request_dispatcher += TypeBasedDispatcher([(KvHintsReqInput, take)])
