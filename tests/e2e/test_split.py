"""Prefill and decode on separate workers: the same text, whoever dies."""

import json
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests

from tests.e2e.conftest import (
    BASE,
    NEW_TOKENS,
    PRIVATE_TMP,
    PROMPTS,
    details,
    eventually,
    memory_process,
    metric,
    nothing_left_behind,
    token_ids,
)
from tools.sglang_server import SglangServer

pytestmark = [
    pytest.mark.timeout(600),
    # Experimental, and minutes long: each kind of process is killed, and started again.
    pytest.mark.skipif("SMG_TEST_SPLIT" not in os.environ, reason="the split: `make test-split`"),
]

SPLIT = (
    *BASE,
    *("--enable-smg", "--smg-host-gb", "0.25", "--enable-metrics", "--log-level", "warning"),
    *("--smg-prefill-workers", "1", "--smg-decode-workers", "1", "--smg-split-tokens", "200"),
)
RESTART_S = 180.0


@pytest.fixture(scope="module")
def split(tiny_model):
    """One server with a prefill and a decode worker for all of this module."""
    before = socket_directories()
    with nothing_left_behind():
        server = SglangServer(tiny_model, SPLIT)
        try:
            yield server.wait_ready()
        finally:
            server.stop()
        eventually(lambda: socket_directories() <= before, "sockets left behind")


@pytest.fixture(autouse=True)
def leaks_nothing(request):
    yield
    if "split" in request.fixturenames:
        assert_idle_and_clean(request.getfixturevalue("split"))


def socket_directories():
    return set(Path(PRIVATE_TMP).glob("smg-phase-*"))


def states(server):
    """What each worker says of itself, by role; needs both to be up."""
    found = [state["smg"] for state in server.get("/server_info")["internal_states"]]
    return {state["worker"]["role"]: state for state in found}


def both_up(server):
    return all(state["worker"]["up"] for state in states(server).values())


def assert_idle_and_clean(server):
    def clean():
        found = states(server)
        return all(
            state["worker"]["up"]
            and state["leases_held"] == state["spills_waiting"] == 0
            and (state["memory"] or {"leases": 0})["leases"] == 0
            for state in found.values()
        )

    eventually(clean, "leases or spills are left", RESTART_S)
    eventually(lambda: open_requests(server) == 0, "the controller still has requests")
    assert "leak" not in server.log.read_text(errors="replace").lower(), server.log_tail()


def open_requests(server):
    return metric(server, "smg:phase_requests")


def worker(server, role):
    """The process of a worker. SGLang calls it after its rank: prefill workers come first."""
    name = f"DP{0 if role == 'prefill' else 1}"
    return next(
        process
        for process in server.processes()
        if process.name().startswith("sglang::schedul") and name in " ".join(process.cmdline())
    )


def controller(server):
    return next(
        process
        for process in server.processes()
        if "data_parallel_controller" in " ".join(process.cmdline())
    )


def routed(server, route):
    return metric(server, "smg:routed_requests_total", route=route)


def stream(server, prompt, tokens, rid=None, **fields):
    """(time, event) of each event of a streamed answer, as they come."""
    body = {
        "input_ids": prompt,
        "stream": True,
        "sampling_params": {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True},
        **({"rid": rid} if rid else {}),
        **fields,
    }
    with requests.post(f"{server.url}/generate", json=body, stream=True, timeout=300) as answer:
        for line in answer.iter_lines():
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                yield time.monotonic(), json.loads(line[6:])


def last_event(server, prompt, tokens, **fields):
    return list(stream(server, prompt, tokens, **fields))[-1][1]


# ---- the same as without ----


def test_texts_are_those_of_one_worker(split, reference):
    before = routed(split, "split")
    for _ in range(2):
        split.flush()
        results = [split.generate(prompt, NEW_TOKENS) for prompt in PROMPTS]
        assert [result["output_ids"] for result in results] == reference
        for prompt, result in zip(PROMPTS[:10], results, strict=False):
            assert details(result)["host"] >= (len(prompt) - 1) // 16 * 16 - 16, "no hand-off"
    eventually(lambda: routed(split, "split") >= before + 2 * 12, "they were not split")


def test_texts_are_the_same_under_concurrency(split, reference):
    work = [index for _ in range(3) for index in range(len(PROMPTS))]
    random.Random(1).shuffle(work)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: split.generate(PROMPTS[i], NEW_TOKENS), work))
    assert [result["output_ids"] for result in results] == [reference[i] for i in work]


def test_a_chat_goes_on_where_its_pages_are(split):
    prompt = token_ids(2000, 400)
    for turn in range(3):
        result = split.generate(prompt, 40)
        if turn:
            assert sum(details(result).values()) >= len(prompt) - 40 - 64
        prompt = prompt + result["output_ids"] + token_ids(2001 + turn, 30)


@pytest.mark.parametrize(
    "fields",
    [{"sampling_params": {"n": 3}}, {"sampling_params": {"regex": "[0-9]{4}"}}],
    ids=["n", "regex"],
)
def test_sampling_features_work(split, fields):
    result = split.generate(token_ids(2100, 600), 8, **fields)
    for one in result if isinstance(result, list) else [result]:
        assert one["meta_info"]["completion_tokens"] > 0


def test_prompt_logprobs_are_computed_where_they_are_asked_for(split):
    prompt = token_ids(2200, 400)
    before = routed(split, "direct")
    result = split.generate(prompt, 2, return_logprob=True, logprob_start_len=0)
    assert len(result["meta_info"]["input_token_logprobs"]) == len(prompt)
    eventually(lambda: routed(split, "direct") > before, "it was split")


def test_a_batch_and_a_stream(split, reference):
    batch = split.generate(PROMPTS[:3], NEW_TOKENS)
    assert [one["output_ids"] for one in batch] == reference[:3]
    events = [event for _, event in stream(split, PROMPTS[4], NEW_TOKENS)]
    assert len(events) > 1 and events[-1]["output_ids"] == reference[4]


def test_openai_completions(split):
    body = {"model": "x", "prompt": "word " * 300, "max_tokens": 5, "temperature": 0}
    assert split.post("/v1/completions", **body).json()["usage"]["completion_tokens"] == 5


def test_too_long_a_prompt_is_refused(split):
    answer = split.post("/generate", input_ids=token_ids(1, 3000), sampling_params={})
    assert answer.status_code == 400


def test_metrics_tell_the_phases_apart(split):
    split.generate(token_ids(2300, 500), 2)
    eventually(lambda: metric(split, "smg:phase_seconds_count", stage="prefill") > 0, "no prefill")
    assert metric(split, "smg:phase_seconds_count", stage="first_decode") > 0
    assert metric(split, "smg:worker_up") == 2


def test_an_idle_server_sleeps(split):
    def ticks():
        return sum(sum(p.cpu_times()[:2]) for p in (controller(split), worker(split, "prefill")))

    time.sleep(3)
    before = ticks()
    time.sleep(3)
    assert ticks() - before < 0.3


# ---- aborts ----


def test_random_aborts_leave_nothing(split, reference):
    rng = random.Random(5)
    stop = threading.Event()
    unhealthy = []

    def watch():
        while not stop.wait(0.5):
            if requests.get(f"{split.url}/health_generate", timeout=30).status_code != 200:
                unhealthy.append(time.monotonic())

    def one(number):
        index = rng.randrange(len(PROMPTS))
        doomed = rng.random() < 0.5
        if doomed:
            delay = rng.random() * 0.6
            threading.Timer(
                delay, lambda: split.post("/abort_request", rid=f"storm-{number}")
            ).start()
        result = split.generate(PROMPTS[index], NEW_TOKENS, rid=f"storm-{number}")
        if result["meta_info"]["finish_reason"]["type"] != "abort":
            assert result["output_ids"] == reference[index]

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(one, range(int(os.environ.get("SMG_TEST_STORM", "150")))))
    stop.set()
    watcher.join()
    assert not unhealthy
    assert split.generate(PROMPTS[0], NEW_TOKENS)["output_ids"] == reference[0]


def test_abort_all(split):
    with ThreadPoolExecutor(8) as pool:
        doomed = [pool.submit(split.generate, PROMPTS[i], 300) for i in range(8)]
        eventually(lambda: open_requests(split) > 0, "nothing is open")
        split.post("/abort_request", abort_all=True)
        assert all(f.result()["meta_info"]["finish_reason"]["type"] == "abort" for f in doomed)


# ---- deaths, under load ----


class Load:
    """Requests of all kinds from several clients until told to stop."""

    def __init__(self, server, reference):
        self.server, self.reference = server, reference
        self.wrong, self.failed, self.done = [], [], 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(4)]

    def _run(self, seed):
        rng = random.Random(seed)
        while not self._stop.is_set():
            index = rng.randrange(len(PROMPTS))
            # Every other one in a namespace of its own, where nothing is cached: it is split.
            own = {"extra_key": f"{seed}-{rng.random()}"} if rng.random() < 0.5 else {}
            try:
                result = self.server.generate(PROMPTS[index], NEW_TOKENS, **own)
            except requests.RequestException as error:
                self.failed.append(error)
                continue
            if result["output_ids"] != self.reference[index]:
                self.wrong.append(index)
            self.done += 1

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        eventually(lambda: self.done > 4, "the load does not run", 60)
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_a_killed_prefill_worker_costs_no_request(split, reference):
    with Load(split, reference) as load:
        worker(split, "prefill").kill()
        done = load.done
        eventually(lambda: load.done > done + 8, "the load stands still", 60)
        eventually(lambda: both_up(split), "it did not come back", RESTART_S)
        before = routed(split, "split")
        eventually(lambda: routed(split, "split") > before, "nothing is split again", 60)
    assert not load.failed and not load.wrong


def test_only_streams_of_a_killed_decode_worker_fail(split, reference):
    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(last_event, split, token_ids(i, 50), 800) for i in range(2)]
        eventually(lambda: metric(split, "smg:phase_requests", stage="streaming") == 2, "no stream")
        worker(split, "decode").kill()
        time.sleep(0.2)
        queued = [pool.submit(split.generate, PROMPTS[i], NEW_TOKENS) for i in range(2)]
        for ended in streams:
            reason = ended.result()["meta_info"]["finish_reason"]
            assert reason["type"] == "abort" and "died" in reason["message"], reason
        assert [one.result()["output_ids"] for one in queued] == reference[:2]
    assert split.get("/health_generate") is not None


def test_a_killed_memory_server_costs_no_request(split, reference):
    with Load(split, reference) as load:
        memory_process(split).kill()
        done = load.done
        eventually(lambda: load.done > done + 8, "the load stands still", 60)
    assert not load.failed and not load.wrong


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_that_hangs_for_a_while_costs_no_request(split, reference, role):
    with Load(split, reference) as load:
        hanging = worker(split, role)
        hanging.suspend()
        time.sleep(10)
        hanging.resume()
        done = load.done
        eventually(lambda: load.done > done + 8, "the load stands still", 60)
    assert not load.failed and not load.wrong


def test_a_killed_controller_ends_the_server_and_leaves_nothing(tiny_model):
    before = socket_directories()
    with nothing_left_behind():
        server = SglangServer(tiny_model, SPLIT)
        try:
            server.wait_ready()
            family = server.processes()
            os.kill(controller(server).pid, signal.SIGKILL)
            server.wait_exit(60)
            psutil.wait_procs(family, timeout=20)
            assert not [p for p in family if p.is_running()]
            assert "crashed" in server.log.read_text(errors="replace")
        finally:
            server.stop()
        eventually(lambda: socket_directories() <= before, "sockets left behind")
