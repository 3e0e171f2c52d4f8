"""The processes of one worker: started, listened to, and started again."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing as mp
import os
import pickle
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import zmq
from sglang.srt.server_args import PortArgs
from sglang.srt.utils.network import get_zmq_socket

from smg_sglang.engine.options.record import carried
from smg_sglang.engine.split.plan import WorkerPlan
from smg_sglang.phase.requests import Role
from smg_sglang.phase.restarts import Restarts

logger = logging.getLogger(__name__)

#: Workers share nothing with the controller but what they are given.
processes = mp.get_context("spawn")
#: How long a dead worker's last words may still be on their way, in milliseconds.
LAST_WORDS_MS = 10


class WorkerLink:
    """One worker as the controller's thread sees it: sockets to and from it, and its life.

    Each start has sockets of its own, so that nothing of a former life can arrive in a later one.
    `outputs` has what SGLang would send to its detokenizer, `answers` what it would send to its
    tokenizer process.
    """

    def __init__(
        self,
        plan: WorkerPlan,
        *,
        server_args: Any,
        port_args: PortArgs,
        directory: Path,
        run_scheduler: Callable[..., None],
        context: zmq.Context[zmq.Socket[bytes]],
    ) -> None:
        self.plan = plan
        self.restarts = Restarts()
        self.up = False
        self.init_info: dict[str, Any] = {}
        self.generation = 0
        self._server_args = server_args
        self._port_args = port_args
        self._directory = directory
        self._run_scheduler = run_scheduler
        self._context = context
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self.input: zmq.Socket[bytes] | None = None
        self.outputs: zmq.Socket[bytes] | None = None
        self.answers: zmq.Socket[bytes] | None = None
        self.unsent: deque[bytes] = deque()

    # ---- life ----

    @property
    def running(self) -> bool:
        """It has processes, be they ready or not."""
        return bool(self._processes)

    def start(self, mem_fraction: float | None) -> None:
        """Start all its ranks; `pipes` tell when they are ready. The caller's thread must live as
        long as they: the kernel kills them when it ends."""
        self.generation += 1
        self.restarts.started()
        ports = self._open_sockets()
        args = self._own_args(mem_fraction)
        for tp_rank in range(args.tp_size):
            reader, writer = processes.Pipe(duplex=False)
            gpu_id = self.plan.gpu_id + tp_rank * args.gpu_id_step + args.base_gpu_id
            process = processes.Process(
                target=self._run_scheduler,
                args=(args, ports, gpu_id, tp_rank, 0, self.plan.index, writer),
            )
            process.start()
            writer.close()
            self._processes.append(process)
            self._pipes.append(reader)

    def kill(self) -> None:
        """End what is left of it, and forget it; `restarts` is the caller's business."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for socket in (self.input, self.outputs, self.answers):
            if socket is not None:
                socket.close(linger=0)
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes, self.up = [], [], False
        self.input = self.outputs = self.answers = None
        self.unsent.clear()
        for file in self._directory.glob(f"{self.plan.index}.{self.generation}.*"):
            file.unlink(missing_ok=True)

    def sentinels(self) -> list[int]:
        """File descriptors that become readable when a rank ends."""
        return [process.sentinel for process in self._processes]

    def ended(self) -> list[int]:
        """Exit codes of ranks that have ended."""
        return [p.exitcode for p in self._processes if p.exitcode is not None]

    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    # ---- becoming ready ----

    def waiting_pipes(self) -> list[int]:
        """File descriptors of the ranks that have not said that they are ready."""
        return [pipe.fileno() for pipe in self._pipes]

    def hear_ready(self) -> bool:
        """Read what ranks say of themselves; True once, when the last one has."""
        for pipe in list(self._pipes):
            try:
                if not pipe.poll():
                    continue
                info = pipe.recv()
            except (EOFError, OSError):
                continue  # it died, which its sentinel tells
            self.init_info = info if not self.init_info else self.init_info
            self._pipes.remove(pipe)
            pipe.close()
        if self._pipes or self.up or not self._processes:
            return False
        self.up = True
        return True

    # ---- words ----

    def send(self, data: bytes) -> None:
        """Never blocks: what nobody takes yet (a worker may be ready before its socket has
        connected) waits in `unsent`. To a worker that is down it is dropped."""
        if self.input is not None:
            self.unsent.append(data)
            self.send_waiting()

    def send_waiting(self) -> None:
        """Send what waits, as far as it is taken."""
        while self.unsent and self.input is not None:
            try:
                self.input.send(self.unsent[0], zmq.NOBLOCK)
            except zmq.Again:
                return
            self.unsent.popleft()

    def last_words(self) -> Iterator[tuple[str, bytes]]:
        """What a dead worker said before it died: ("outputs" or "answers", message)."""
        for name in ("outputs", "answers"):
            socket = getattr(self, name)
            while socket is not None and socket.poll(LAST_WORDS_MS):
                yield name, socket.recv()

    # ---- starting ----

    def _open_sockets(self) -> PortArgs:
        fresh = PortArgs.init_new(self._server_args)
        _unlink_files_of(fresh)
        names = {
            name: f"ipc://{self._directory}/{self.plan.index}.{self.generation}.{name}"
            for name in ("input", "outputs", "answers", "rpc", "metrics")
        }
        self.input = get_zmq_socket(self._context, zmq.PUSH, names["input"], True)
        self.outputs = get_zmq_socket(self._context, zmq.PULL, names["outputs"], True)
        self.answers = get_zmq_socket(self._context, zmq.PULL, names["answers"], True)
        self.init_info = {}
        return dataclasses.replace(
            fresh,
            scheduler_input_ipc_name=names["input"],
            detokenizer_ipc_name=names["outputs"],
            tokenizer_ipc_name=names["answers"],
            rpc_ipc_name=names["rpc"],
            metrics_ipc_name=names["metrics"],
            instance_id=self._port_args.instance_id,
        )

    def _own_args(self, mem_fraction: float | None) -> Any:
        """A copy of the arguments that says who this worker is."""
        from sglang.srt.arg_groups.overrides import declare_resolution

        args = pickle.loads(pickle.dumps(self._server_args))
        carried(args)["worker"] = {
            "role": str(self.plan.role),
            "index": self.plan.index,
            "outputs": f"ipc://{self._directory}/{self.plan.index}.{self.generation}.outputs",
        }
        if mem_fraction is not None:
            declare_resolution(args, "smg", mem_fraction_static=mem_fraction)
        return args

    @property
    def is_prefill(self) -> bool:
        return self.plan.role is Role.PREFILL


def _unlink_files_of(ports: PortArgs) -> None:
    """`PortArgs.init_new` leaves an empty file for each socket it names."""
    for name in dataclasses.fields(ports):
        value = getattr(ports, name.name)
        if isinstance(value, str) and value.startswith("ipc:///"):
            try:
                os.unlink(value.removeprefix("ipc://"))
            except OSError:
                pass
