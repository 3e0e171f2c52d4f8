"""The shell round the controller, with real sockets and processes but workers without a model."""

import multiprocessing
import os
import signal
import threading
import time

import psutil
import pytest
import zmq

sglang = pytest.importorskip("sglang")
from sglang.srt.managers import io_struct  # noqa: E402
from sglang.srt.managers.io_struct import (  # noqa: E402
    AbortReq,
    BatchTokenIDOutput,
    FlushCacheReqInput,
    FlushCacheReqOutput,
    GetInternalStateReq,
    GetInternalStateReqOutput,
    ShutdownReq,
)
from sglang.srt.server_args import PortArgs, ServerArgs  # noqa: E402

from smg_sglang.engine.options.record import ATTRIBUTE  # noqa: E402
from smg_sglang.engine.split import launch as phase_launch  # noqa: E402
from smg_sglang.engine.split import worker_link as phase_workers  # noqa: E402
from smg_sglang.engine.split.shell import PhaseShell  # noqa: E402
from tests.phase.fakes import ENDLESS, SILENT, SLOW, request, run_fake  # noqa: E402

LIMIT_S = 30.0


class World:
    """A shell in a thread, and the tokenizer process's and detokenizer's ends of its sockets."""

    def __init__(self, model, prefill, decode):
        args = ServerArgs(model_path=str(model), device="cpu")
        config = {"prefill_workers": prefill, "decode_workers": decode, "split_tokens": 100}
        setattr(args, ATTRIBUTE, {"origin": "test", "config": config})
        phase_launch.prepare(args)
        ports = PortArgs.init_new(args)
        self.context = context = zmq.Context()
        self.to_shell = context.socket(zmq.PUSH)
        self.outputs, self.answers = context.socket(zmq.PULL), context.socket(zmq.PULL)
        for socket, name in (
            (self.to_shell, ports.scheduler_input_ipc_name),
            (self.outputs, ports.detokenizer_ipc_name),
            (self.answers, ports.tokenizer_ipc_name),
        ):
            socket.bind(name)
        self.shell = PhaseShell(args, ports, run_fake)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.failure = None
        self.thread.start()
        self.until(lambda: all(link.up for link in self.shell.links))
        # The controller hears of it a moment later, and until then gives all to the others.
        self.until(lambda: all(worker.up for worker in self.shell.machine.workers))

    def _run(self):
        try:
            self.shell.start()
            self.shell.run()
        except Exception as error:
            self.failure = error
        finally:
            self.shell.close()

    def send(self, message):
        io_struct.sock_send(self.to_shell, message)

    def until(self, condition):
        deadline = time.monotonic() + LIMIT_S
        while not (value := condition()):
            assert time.monotonic() < deadline and self.failure is None
            time.sleep(0.005)
        return value

    def receive(self, socket, kind):
        assert socket.poll(LIMIT_S * 1000), f"nothing came: {self.failure!r}"
        message = io_struct.sock_recv(socket)
        assert isinstance(message, kind)
        return message

    def output(self):
        """(rid, finish reason, tokens) of the next output."""
        message = self.receive(self.outputs, BatchTokenIDOutput)
        return message.rids[0], message.finished_reasons[0], message.completion_tokens[0]

    def finished(self):
        while True:
            rid, reason, tokens = self.output()
            if reason is not None:
                return rid, reason["type"], tokens

    def answer(self, kind):
        return self.receive(self.answers, kind)

    def worker(self, index):
        (pid,) = self.shell.links[index].pids()
        return pid

    def states(self):
        self.send(GetInternalStateReq())
        return [self.answer(GetInternalStateReqOutput).internal_state for _ in self.shell.links]

    def stop(self):
        self.send(ShutdownReq())
        self.thread.join(LIMIT_S)
        assert not self.thread.is_alive() and self.failure is None
        self.context.destroy(linger=0)
        phase_launch.retire()


@pytest.fixture
def make_world(tiny_model, monkeypatch):
    # Fakes fork from a process that has imported all they need, and has no ZMQ threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.phase.fakes"])
    monkeypatch.setattr(phase_workers, "processes", context)
    worlds = []

    def make(prefill=1, decode=1):
        worlds.append(World(tiny_model, prefill, decode))
        return worlds[-1]

    yield make
    for world in worlds:
        world.stop()


def long_prompt(kind=1, length=200):
    return [kind, *range(1000, 1000 + length - 1)]


def test_a_long_prompt_is_answered_once(make_world):
    world = make_world()
    world.send(request("a", long_prompt()))
    assert [world.output()[2] for _ in range(4)] == [1, 2, 3, 4]
    assert world.shell.machine.counters["split"] == 1
    world.until(lambda: not world.shell.machine.requests)


def test_a_killed_prefill_worker_costs_no_request_and_comes_back(make_world):
    world = make_world()
    for n in range(5):
        world.send(request(f"r{n}", long_prompt(SILENT)))
    world.until(lambda: len(world.shell.machine.prefill_workers[0].work) == 5)
    for n in range(5, 10):
        world.send(request(f"r{n}", long_prompt(SLOW)))
    os.kill(world.worker(0), signal.SIGKILL)
    done = {world.finished()[0] for _ in range(5)}
    assert done == {f"r{n}" for n in range(5, 10)}
    # The silent ones are at the decode worker now, which is as silent.
    world.until(lambda: len(world.shell.machine.decode_workers[0].work) == 5)
    world.send(AbortReq(rid="r"))
    assert {world.answer(AbortReq).rid for _ in range(5)} == {f"r{n}" for n in range(5)}
    world.until(lambda: world.shell.links[0].up)
    world.send(request("after", long_prompt(length=300)))
    assert world.finished()[:2] == ("after", "length")
    world.until(lambda: not world.shell.machine.requests)


def test_streams_of_a_killed_decode_worker_end_with_an_error_and_the_rest_goes_on(make_world):
    world = make_world()
    world.send(request("stream", [ENDLESS, 1, 2]))
    assert world.output() == ("stream", None, 1)
    world.send(request("queued", [SILENT, 1, 2]))
    world.until(lambda: len(world.shell.machine.decode_workers[0].work) == 2)
    os.kill(world.worker(1), signal.SIGKILL)
    rid, reason, _ = world.output()
    assert (rid, reason["type"], reason["status_code"]) == ("stream", "abort", 503)
    assert "died" in reason["message"]
    world.until(lambda: world.shell.links[1].up)
    world.send(request("next", [1, 2, 3]))
    assert world.finished()[:2] == ("next", "length")
    world.until(lambda: list(world.shell.machine.requests) == ["queued"])
    world.send(AbortReq(rid="queued"))
    assert world.answer(AbortReq).rid == "queued"


def test_control_messages_get_as_many_answers_as_there_are_workers(make_world):
    world = make_world(prefill=2, decode=1)
    os.kill(world.worker(2), signal.SIGSTOP)
    for _ in range(2):
        world.send(FlushCacheReqInput())
    for _ in range(4):
        world.answer(FlushCacheReqOutput)
    os.kill(world.worker(2), signal.SIGKILL)
    for _ in range(2):
        assert world.answer(FlushCacheReqOutput).success, "answered for the dead"
    assert len(world.states()) == 3


def test_an_abort_while_prefilling_is_answered_at_once(make_world):
    world = make_world()
    world.send(request("a", long_prompt(SILENT)))
    world.until(lambda: world.shell.machine.prefill_workers[0].work)
    world.send(AbortReq(rid="a"))
    assert world.answer(AbortReq).rid == "a"
    world.until(lambda: not world.shell.machine.prefill_workers[0].work)
    assert all(state.get("open", []) == [] for state in world.states())


def test_without_prefill_workers_decode_workers_share_the_work(make_world):
    world = make_world(prefill=0, decode=2)
    for n in range(6):
        # No two begin alike: one that does would go where the first was answered.
        world.send(request(f"r{n}", [ENDLESS, n, *long_prompt()]))
    world.until(lambda: [len(worker.work) for worker in world.shell.machine.workers] == [3, 3])


def test_a_message_nobody_understands_is_dropped(make_world):
    world = make_world()
    world.to_shell.send(b"\xc1 not msgpack")
    world.send(request("a", [1, 2, 3]))
    assert world.finished()[:2] == ("a", "length")


def test_an_idle_controller_uses_no_cpu(make_world):
    world = make_world()
    clock = time.clock_gettime
    which = time.pthread_getcpuclockid(world.thread.ident)
    began = clock(which)
    time.sleep(1.0)
    assert clock(which) - began < 0.01


def test_null_work_costs_less_than_a_millisecond_a_request(make_world):
    world = make_world(prefill=1, decode=1)
    number, lengths = 1000, (50, 1500)
    which = time.pthread_getcpuclockid(world.thread.ident)
    requests = [request(f"r{n}", [1, *range(n, n + lengths[n % 2])], 2) for n in range(number)]
    began = time.clock_gettime(which)
    for message in requests:
        world.send(message)
    for _ in range(number):
        world.finished()
    spent = (time.clock_gettime(which) - began) / number
    assert world.shell.machine.counters["split"] == number / 2
    assert spent < 0.001, f"{1e3 * spent:.3f} ms a request"


def test_workers_and_sockets_are_gone_after_a_stop(make_world):
    world = make_world()
    pids = [world.worker(0), world.worker(1)]
    world.stop()
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert not world.shell.links[0]._directory.exists()
    world.stop = lambda: None
