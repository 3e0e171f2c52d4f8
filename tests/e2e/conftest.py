"""Servers for the end-to-end tests. A start takes most of a minute, so tests share them."""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import shutil
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from tools.sglang_server import SglangServer, running_server

#: Where the servers of these tests put their sockets, so that other servers on the box do not count
#: as left behind. Short, since a socket's path is.
PRIVATE_TMP = tempfile.mkdtemp(prefix="smg-e2e-", dir="/tmp")
atexit.register(shutil.rmtree, PRIVATE_TMP, ignore_errors=True)
os.environ["TMPDIR"] = PRIVATE_TMP

#: A pool much smaller than the working set, so that every test sees evictions. fp32: texts are
#: compared token for token. One thread a server: the box may have two cores for two servers.
POOL_TOKENS = 2048
BASE = (
    "--dtype",
    "float32",
    "--max-total-tokens",
    str(POOL_TOKENS),
    "--chunked-prefill-size",
    "512",
)
SMG = (*BASE, "--enable-smg", "--smg-host-gb", "0.25", "--enable-metrics", "--log-level", "warning")


def token_ids(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000, 40000) for _ in range(length)]


#: Long, short, shared prefixes, a page multiple and not, one token, longer than a prefill chunk.
PROMPTS = [
    *(token_ids(seed, 700 + 37 * seed) for seed in range(10)),
    *(token_ids(100, 640) + token_ids(200 + seed, 90) for seed in range(4)),
    token_ids(300, 512),
    token_ids(301, 513),
    token_ids(302, 15),
    token_ids(303, 1),
]
NEW_TOKENS = 12

#: SGLang's own test switch: requests are retracted, each time more than a page later.
RETRACTIONS = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "40"}
#: And each copy begins up to so much later.
DISTURBED = {"SMG_TEST_COPY_DELAY_MS": "3", **RETRACTIONS}

#: (prompt, tokens to generate), all larger than the pool: four times, just, with a shared prefix,
#: with a long answer.
LONG = [
    (token_ids(400, 8100), NEW_TOKENS),
    (token_ids(401, 5000), NEW_TOKENS),
    (token_ids(400, 6000) + token_ids(402, 901), NEW_TOKENS),
    (token_ids(403, POOL_TOKENS), NEW_TOKENS),
    (token_ids(404, 3000), 400),
]


@pytest.fixture(scope="session")
def stock_answers(tiny_model) -> tuple[list[list[int]], list[list[int]]]:
    """What stock SGLang answers to PROMPTS and to LONG, with its own attention and a pool that
    holds all."""
    args = (
        "--dtype",
        "float32",
        "--max-total-tokens",
        "32768",
        "--attention-backend",
        "torch_native",
    )
    with running_server(tiny_model, (*args, "--log-level", "warning")) as server:
        short = [server.generate(prompt, NEW_TOKENS)["output_ids"] for prompt in PROMPTS]
        return short, [server.generate(prompt, new)["output_ids"] for prompt, new in LONG]


@pytest.fixture(scope="session")
def reference(stock_answers) -> list[list[int]]:
    """Stock SGLang's answers to PROMPTS."""
    return stock_answers[0]


@pytest.fixture(scope="session")
def long_reference(stock_answers) -> list[list[int]]:
    """Stock SGLang's answers to LONG."""
    return stock_answers[1]


@pytest.fixture(scope="module")
def server(request, tiny_model):
    """One server with `--enable-smg` for a module, whose `SERVER_ARGS`, `SERVER_ENV` add to it."""
    extra = getattr(request.module, "SERVER_ARGS", ())
    env = getattr(request.module, "SERVER_ENV", {})
    with nothing_left_behind(), running_server(tiny_model, (*SMG, *extra), env) as running:
        yield running


@pytest.fixture(autouse=True)
def leaks_nothing(request):
    """After each test on `server`: no slot, host page or lease is held once it is idle."""
    yield
    if "server" in request.fixturenames:
        assert_idle_and_clean(request.getfixturevalue("server"))


@contextlib.contextmanager
def nothing_left_behind():
    """No process, socket directory or memfd of ours outlives the block."""
    before = set(_our_directories())
    children_before = _descendants()
    yield
    eventually(lambda: set(_our_directories()) <= before, "socket directories left behind")
    eventually(lambda: _descendants() <= children_before, "processes left behind")


def _our_directories() -> list[Path]:
    return list(Path(PRIVATE_TMP).glob("smg-memory-*"))


def _descendants() -> set[int]:
    return {p.pid for p in psutil.Process(os.getpid()).children(recursive=True)}


def eventually(condition, what: str, timeout_s: float = 20.0):
    """Poll until the condition holds; its value. Fails with `what` after the timeout."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return value


def smg_state(server: SglangServer) -> dict:
    return server.get("/server_info")["internal_states"][0]["smg"]


def memory_process(server: SglangServer) -> psutil.Process:
    """The embedded memory server's process."""
    return next(p for p in server.processes() if "smg_sglang" in p.cmdline())


def metric(server: SglangServer, name: str, **labels: str) -> float:
    """Sum of a series over all labels but those given; 0 where it has not appeared."""
    total = 0.0
    for line in server.get("/metrics").splitlines():
        if line.startswith(name + "{") and all(f'{k}="{v}"' in line for k, v in labels.items()):
            total += float(line.rsplit(" ", 1)[1])
    return total


def details(answer: dict) -> dict[str, int]:
    """Cached prompt tokens by tier."""
    return answer["meta_info"].get("cached_tokens_details") or {"device": 0, "host": 0}


def in_host_memory(server: SglangServer, at_least: int = 1) -> None:
    """Wait until spills have been published."""
    eventually(
        lambda: smg_state(server)["memory"]["pages_ready"] >= at_least, "no page was published"
    )


def assert_idle_and_clean(server: SglangServer) -> None:
    def clean() -> bool:
        # Stock SGLang says 200 only when no request holds anything.
        if server.get("/health") is None:
            return False
        state = smg_state(server)
        memory = state["memory"]
        return (
            state["leases_held"] == 0
            and state["spills_waiting"] == 0
            and (memory is None or (memory["leases"] == 0 and memory["pages_writing"] == 0))
        )

    eventually(clean, "leases or half-written pages are left")
    assert "leak" not in server.log.read_text(errors="replace").lower(), server.log_tail()
