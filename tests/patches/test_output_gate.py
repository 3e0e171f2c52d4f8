"""0008: which outputs a worker holds back, and which it sends at once."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock

import msgspec
import pytest
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchEmbeddingOutput,
    BatchTokenIDOutput,
    FreezeGCReq,
)

from smg_sglang.engine.split import publication

SENDER = "sglang.srt.managers.scheduler_components.output_sender"
TARGET = f"{SENDER}.SenderWrapper".removeprefix("sglang.srt.")
OUTPUTS = [BatchTokenIDOutput, BatchEmbeddingOutput, AbortReq, FreezeGCReq]


def empty(kind):
    """A message whose required fields, which nothing here reads, are None."""
    return kind(**{field.name: None for field in msgspec.structs.fields(kind) if field.required})


class Worker:
    """What a worker of some role sends and holds back."""

    def __init__(self, monkeypatch, *, prefill: bool) -> None:
        self.seen: list[tuple[str, str, str | None]] = []
        held = SimpleNamespace(send=self._note("held"))
        self.outputs = held if prefill else None
        monkeypatch.setattr(publication._Process, "outputs", self.outputs)

    def output_gate(self):
        """What `SmgRadixCache` would have where SGLang has the patch."""
        if self.outputs is None:
            return None

        def gate(output):
            taken = isinstance(output, BatchTokenIDOutput)
            if taken:
                self.outputs.send(output)
            return taken

        return gate

    def send(self, module, gate=None, *, socket="socket", recv_obj=None):
        self.seen.clear()
        module.sock_send = lambda _, output: self._note("sent")(output)
        sender = module.SenderWrapper(socket)
        if gate is not None:
            sender.gate = gate
        for kind in OUTPUTS:
            sender.send_output(empty(kind), recv_obj)
        return self.seen.copy()

    def _note(self, what):
        return lambda output: self.seen.append(
            (what, type(output).__name__, getattr(output, "http_worker_ipc", None))
        )


def everywhere(hooks, stock, patched, worker, **how):
    """By the hook, and by the patch."""
    module = stock.module(SENDER)
    hooks.apply(TARGET, module.SenderWrapper, "send_output")
    hooked = worker.send(module, **how)
    return hooked, worker.send(patched.module(SENDER), worker.output_gate(), **how)


def expected(first, route):
    """Only a message of one request takes the route back of the request that it answers."""
    return [
        (first, "BatchTokenIDOutput", None),
        ("sent", "BatchEmbeddingOutput", None),
        ("sent", "AbortReq", route),
        ("sent", "FreezeGCReq", route),
    ]


@pytest.mark.parametrize(("prefill", "first"), [(True, "held"), (False, "sent")])
@pytest.mark.parametrize("route", [None, "ipc://worker"])
def test_hook_and_patch_hold_back_the_tokens_of_a_prefill_worker_only(
    sglangs, monkeypatch, prefill, first, route
):
    worker = Worker(monkeypatch, prefill=prefill)
    caller = SimpleNamespace(http_worker_ipc=route)
    hooked, patched = everywhere(*sglangs, worker, recv_obj=caller)
    assert hooked == patched == expected(first, route)


def test_neither_does_anything_on_a_rank_without_a_socket(sglangs, monkeypatch):
    worker = Worker(monkeypatch, prefill=True)
    assert everywhere(*sglangs, worker, socket=None) == ([], [])


def test_the_scheduler_asks_its_cache_for_the_gate(patched):
    source = patched.path("sglang.srt.managers.scheduler").read_text()
    line = "self.ipc_channels.send_to_detokenizer.gate = self.tree_cache.output_gate()"
    assert source.count(line) == 1
    before = source[: source.index(line)]
    assert before.index("self.init_ipc_channels(port_args)") < before.index("self.tree_cache = ")


def test_a_cache_that_says_nothing_holds_back_nothing(patched):
    base = patched.module("sglang.srt.mem_cache.base_prefix_cache").BasePrefixCache
    assert base.output_gate(MagicMock()) is None
    assert patched.module(SENDER).SenderWrapper(None).gate is None
