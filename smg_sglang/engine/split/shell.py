"""The shell round the phase controller: ZMQ sockets, processes and the clock.

It takes the place of SGLang's `DataParallelController`, in its process, between the tokenizer
process and the workers. Decisions are in `smg_sglang.phase`; here messages are read, sent and
passed on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchEmbeddingOutput,
    BatchTokenIDOutput,
    BatchTokenizedEmbeddingReqInput,
    BatchTokenizedGenerateReqInput,
    CloseSessionReqInput,
    FlushCacheReqInput,
    OpenSessionReqInput,
    ShutdownReq,
    TokenizedEmbeddingReqInput,
    TokenizedGenerateReqInput,
)
from sglang.srt.managers.utils import is_health_check_generate_req
from sglang.srt.utils.network import get_zmq_socket

from smg_sglang.engine.options.record import carried, chosen
from smg_sglang.engine.split import wire
from smg_sglang.engine.split.memory_shares import MemoryShares
from smg_sglang.engine.split.metrics import PhaseMetrics
from smg_sglang.engine.split.plan import WorkerPlan
from smg_sglang.engine.split.worker_link import WorkerLink
from smg_sglang.errors import SmgError
from smg_sglang.phase.actions import (
    AbortAt,
    Action,
    SendCopy,
    SendOriginal,
    TellAborted,
    TellFailed,
)
from smg_sglang.phase.controller import PhaseController
from smg_sglang.phase.errands import Errand, Errands
from smg_sglang.phase.requests import Role
from smg_sglang.phase.routing import RoutingConfig

logger = logging.getLogger(__name__)

#: Messages read from one socket before the others have their turn.
BURST = 64
METRICS_EVERY_S = 1.0
#: A worker that is ready but whose socket has not connected is tried again after so long.
UNSENT_RETRY_S = 0.002


class WorkersBroken(SmgError):
    """A worker cannot be started, or not be started with the weights it needs."""


class PhaseShell:
    """One thread, which sleeps in a poller until a socket, a process or the clock wants it."""

    def __init__(
        self, server_args: Any, port_args: Any, run_scheduler: Callable[..., None]
    ) -> None:
        choice, config = carried(server_args), chosen(server_args)
        plans = [WorkerPlan(**plan) for plan in choice["plans"]]
        prefill = sum(plan.role is Role.PREFILL for plan in plans)
        self.metrics = PhaseMetrics.make(server_args, plans)
        self.machine = PhaseController(
            prefill,
            len(plans) - prefill,
            RoutingConfig(split_tokens=config.split_tokens),
            observe=self.metrics.observe,
        )
        self.errands = Errands()
        self._context = context = zmq.Context[zmq.Socket[bytes]](1)
        self._from_tokenizer = get_zmq_socket(
            context, zmq.PULL, port_args.scheduler_input_ipc_name, False
        )
        self._to_tokenizer = get_zmq_socket(context, zmq.PUSH, port_args.tokenizer_ipc_name, False)
        detokenizer = port_args.detokenizer_ipc_name
        if resolving_view(server_args).skip_tokenizer_init:
            detokenizer = port_args.tokenizer_ipc_name
        self._to_detokenizer = get_zmq_socket(context, zmq.PUSH, detokenizer, False)
        self.links = [
            WorkerLink(
                plan,
                server_args=server_args,
                port_args=port_args,
                directory=Path(choice["sockets"]),
                run_scheduler=run_scheduler,
                context=context,
            )
            for plan in plans
        ]
        self._decode_range = range(prefill, len(plans))
        self._shares = MemoryShares(server_args, plans)
        self._poller = zmq.Poller()
        self._poller_stale = True
        self._health_turn = 0
        self._weights_changed = False
        self._stopping = False
        self._metrics_at = 0.0
        self._handlers = self._make_handlers()

    def _make_handlers(self) -> dict[type, Callable[[bytes, Any], None]]:
        return {
            TokenizedGenerateReqInput: self._on_request,
            TokenizedEmbeddingReqInput: self._on_request,
            BatchTokenizedGenerateReqInput: self._on_batch,
            BatchTokenizedEmbeddingReqInput: self._on_batch,
            AbortReq: self._on_abort,
            OpenSessionReqInput: self._on_session,
            CloseSessionReqInput: self._on_session,
            ShutdownReq: self._on_shutdown,
        }

    # ---- the loop ----

    def start(self) -> None:
        """Return when all workers are ready.

        Raises:
            WorkersBroken: one of them ended before it was.
        """
        for link in self.links:
            link.restarts.due_at = 0.0
        while not all(link.up for link in self.links):
            self._turn()
            for link in self.links:
                if link.restarts.failures:
                    raise WorkersBroken(f"the {link.plan.name} could not be started; see its log")

    def run(self) -> None:
        """Serve until told to stop.

        Raises:
            WorkersBroken: it makes no sense to go on.
        """
        while not (self._stopping and not any(link.running for link in self.links)):
            self._turn()

    def close(self) -> None:
        """End all workers, and let what was said to others go out."""
        for link in self.links:
            link.kill()
        self._context.destroy(linger=1000)

    def _turn(self) -> None:
        self._start_due()
        self._refresh_poller()
        ready = dict(self._poller.poll(self._timeout_ms()))
        for link in self.links:
            link.send_waiting()
            self._listen(link, ready)
        if self._from_tokenizer in ready:
            for data in _burst(self._from_tokenizer):
                self._guarded(self._on_client, data)
        for link in self.links:
            if link.ended():
                self._on_end(link)
        now = time.monotonic()
        self._do(self.machine.tick(now))
        if self.metrics.enabled and now >= self._metrics_at:
            self._metrics_at = now + METRICS_EVERY_S
            self.metrics.publish(self.machine)

    def _timeout_ms(self) -> int | None:
        """Until the next thing that the clock wants; None: it wants nothing."""
        now = time.monotonic()
        due = [link.restarts.due_at for link in self.links if link.restarts.due_at is not None]
        if any(link.unsent for link in self.links):
            due.append(now + UNSENT_RETRY_S)
        tick = self.machine.next_tick(now)
        if tick is not None:
            due.append(tick)
        if self.metrics.enabled and (self.machine.requests or self.metrics.stale):
            due.append(self._metrics_at)
        return None if not due else max(0, int((min(due) - now) * 1000) + 1)

    def _refresh_poller(self) -> None:
        if not self._poller_stale:
            return
        self._poller_stale = False
        self._poller = zmq.Poller()
        self._poller.register(self._from_tokenizer, zmq.POLLIN)
        for link in self.links:
            sockets = [socket for socket in (link.outputs, link.answers) if socket is not None]
            for waited in [*sockets, *link.sentinels(), *link.waiting_pipes()]:
                self._poller.register(waited, zmq.POLLIN)

    def _listen(self, link: WorkerLink, ready: dict[Any, int]) -> None:
        if link.outputs in ready:
            for data in _burst(link.outputs):
                self._guarded(self._on_output, link, data)
        if link.answers in ready:
            for data in _burst(link.answers):
                self._guarded(self._on_answer, link, data)
        if any(pipe in ready for pipe in link.waiting_pipes()):
            self._poller_stale = True
            if link.hear_ready():
                self._on_ready(link)

    def _guarded(self, handle: Callable[..., None], *args: Any) -> None:
        """One message that we cannot understand must not end the server."""
        try:
            handle(*args)
        except WorkersBroken:
            raise
        except Exception:
            logger.exception("smg: a message could not be handled; it is dropped")

    # ---- from clients ----

    def _on_client(self, data: bytes) -> None:
        message = wire.decode(data)
        self._handlers.get(type(message), self._on_control)(data, message)

    def _on_request(self, data: bytes, message: Any) -> None:
        original = wire.without_rank(wire.Original(data, message))
        if is_health_check_generate_req(message):
            self._send_health_check(original.data)
            return
        arrival = wire.arrival(original, self._decode_range)
        self._do(self.machine.arrived(arrival, time.monotonic()))

    def _on_batch(self, data: bytes, message: Any) -> None:
        for one in message.batch:
            self._on_request(wire.encode(one), one)

    def _send_health_check(self, data: bytes) -> None:
        """Decode workers in turn; it is dropped while none is up, and the client times out."""
        up = [self.links[index] for index in self._decode_range if self.links[index].up]
        if up:
            self._health_turn += 1
            up[self._health_turn % len(up)].send(data)

    def _on_abort(self, data: bytes, message: Any) -> None:
        prefix = "" if message.abort_all else message.rid
        if message.abort_all or prefix:
            self._do(self.machine.aborted(prefix, time.monotonic()))

    def _on_session(self, data: bytes, message: Any) -> None:
        """A session lives in one decode worker."""
        home = wire.home_of(message.session_id, self._decode_range)
        self._give_errand(self.links[home], data, message)

    def _on_shutdown(self, data: bytes, message: Any) -> None:
        self._stopping = True
        for link in self.links:
            if link.up:
                link.send(data)
            elif link.running:
                link.kill()
            link.restarts.due_at = None
        self._poller_stale = True

    def _on_control(self, data: bytes, message: Any) -> None:
        """Anything else is for all workers, each of which answers."""
        if isinstance(message, FlushCacheReqInput):
            self.machine.flushed()
        if wire.changes_weights(message) and not self._weights_changed:
            # Each worker now takes a namespace of its own in memory, so nothing can be handed off.
            logger.warning("smg: after a change of weights prompts are no longer split")
            self._weights_changed, self.machine.split_enabled = True, False
        for link in self.links:
            self._give_errand(link, data, message)

    def _give_errand(self, link: WorkerLink, data: bytes, message: Any) -> None:
        answer = wire.answer_type(message)
        if answer is not None:
            self.errands.add(link.plan.index, Errand(data, answer))
        if link.up:
            link.send(data)
        else:
            self._answer_for(link)

    def _answer_for(self, link: WorkerLink) -> None:
        for errand in self.errands.excuse(link.plan.index, wire.ANSWERED_FOR):
            self._to_tokenizer.send(
                wire.answer_for(errand.answer, str(link.plan.role), link.plan.index)
            )

    # ---- from workers ----

    def _on_output(self, link: WorkerLink, data: bytes) -> None:
        message = wire.decode(data)
        batch = isinstance(message, BatchTokenIDOutput | BatchEmbeddingOutput)
        if batch and link.is_prefill:
            self._on_prefilled(link, message)
            return
        self._to_detokenizer.send(data)
        if batch:
            self._on_tokens(link, message)

    def _on_prefilled(self, link: WorkerLink, message: Any) -> None:
        now = time.monotonic()
        for rid, reason in zip(message.rids, message.finished_reasons, strict=True):
            if reason is not None:
                ok = reason.get("type") != "abort"
                self._do(self.machine.prefilled(rid, link.plan.index, now, ok))

    def _on_tokens(self, link: WorkerLink, message: Any) -> None:
        now, worker = time.monotonic(), link.plan.index
        generated = getattr(message, "completion_tokens", None) or [0] * len(message.rids or ())
        for rid, reason, tokens in zip(
            message.rids or (), message.finished_reasons, generated, strict=True
        ):
            self.machine.answered(rid, worker, now, reason is not None, tokens)

    def _on_answer(self, link: WorkerLink, data: bytes) -> None:
        message = wire.decode(data)
        now, worker = time.monotonic(), link.plan.index
        if isinstance(message, AbortReq):
            if link.is_prefill:
                self._do(self.machine.prefilled(message.rid, worker, now, ok=False))
                return
            self.machine.ended(message.rid, worker, now)
        else:
            self.errands.answered(worker, type(message).__name__)
        self._to_tokenizer.send(data)

    # ---- lives of workers ----

    def _start_due(self) -> None:
        now = time.monotonic()
        for link in self.links:
            due = link.restarts.due_at
            if due is not None and now >= due and not self._neighbour_loads(link):
                link.start(self._shares.fraction(link.plan))
                self._poller_stale = True

    def _neighbour_loads(self, link: WorkerLink) -> bool:
        """On a GPU each worker measures what is free while it loads, so they load in turn."""
        device = link.plan.device
        return device != "cpu" and any(
            other.running and not other.up and other.plan.device == device for other in self.links
        )

    def _on_ready(self, link: WorkerLink) -> None:
        now, worker = time.monotonic(), link.plan.index
        link.restarts.came_up(now)
        logger.info("smg: the %s is ready", link.plan.name)
        for errand in self.errands.owed(worker):
            link.send(errand.message)  # type: ignore[arg-type]  # opaque there, bytes here
        self._do(self.machine.worker_ready(worker, now, link.init_info.get("max_req_input_len")))

    def _on_end(self, link: WorkerLink) -> None:
        """A rank has ended: hear what it still said, then end the others and plan a restart."""
        codes, was_up, now = link.ended(), link.up, time.monotonic()
        for name, data in link.last_words():
            self._guarded(self._on_output if name == "outputs" else self._on_answer, link, data)
        link.kill()
        self._poller_stale = True
        if self._stopping:
            return
        link.restarts.died(now)
        logger.error("smg: the %s has ended with exit code %s", link.plan.name, codes)
        if was_up:
            self._do(self.machine.worker_died(link.plan.index, now))
        self._answer_for(link)
        self._check_hope(link)

    def _check_hope(self, link: WorkerLink) -> None:
        if self._weights_changed:
            raise WorkersBroken(
                f"the {link.plan.name} died after a change of weights, which a new one would lack"
            )
        if link.restarts.hopeless and not link.is_prefill:
            raise WorkersBroken(f"the {link.plan.name} cannot be started any more; see its log")

    # ---- doing ----

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case SendCopy(payload, copy_rid, worker):
                    assert isinstance(payload, wire.Original)
                    copy = wire.make_copy(payload.message, copy_rid)
                    payload.message = None
                    self.links[worker].send(copy)
                case SendOriginal(payload, _, worker):
                    assert isinstance(payload, wire.Original)
                    payload.message = None
                    self.links[worker].send(payload.data)
                case AbortAt(rid, worker):
                    self.links[worker].send(wire.abort_answer(rid))
                case TellAborted(rid):
                    self._to_tokenizer.send(wire.abort_answer(rid))
                case TellFailed(rid, message):
                    self._to_detokenizer.send(wire.failed_answer(rid, message))


def _burst(socket: Any) -> list[bytes]:
    """What waits in a socket, BURST messages at most."""
    found: list[bytes] = []
    while len(found) < BURST:
        try:
            found.append(socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            break
    return found
