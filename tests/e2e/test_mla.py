"""Latents (MLA) of two tensor-parallel ranks: in host memory once, whatever the number of ranks.

Every copy is delayed at random, and SGLang's own test switch retracts requests.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.conftest import (
    BASE,
    DISTURBED,
    LONG,
    NEW_TOKENS,
    PROMPTS,
    details,
    eventually,
    nothing_left_behind,
)
from tests.e2e.test_host_tier import answers, ids
from tests.e2e.test_shared_memory import MODE, standalone_memory, stats
from tests.e2e.test_streams import ask_long
from tools.sglang_server import running_server

pytestmark = pytest.mark.timeout(600)

#: Of LONG, those with short answers that are not four times the pool.
STREAMED = (1, 2, 3)


@pytest.fixture(scope="module")
def stock(tiny_mla):
    """What SGLang answers to PROMPTS and LONG without a host tier, its pool holding all. Its own
    attention on a CPU (torch_native) cannot read latents, so it uses ours."""
    args = ("--dtype", "float32", "--max-total-tokens", "32768", "--log-level", "warning")
    with running_server(tiny_mla, args) as server:
        streamed = {index: ask_long(server, index)["output_ids"] for index in STREAMED}
        return ids(answers(server)), streamed


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    with nothing_left_behind(), standalone_memory(tmp_path_factory.mktemp("m")) as address:
        yield address


def in_memory(address):
    """(namespaces with pages, their bytes), once nothing more is being written."""
    seen = []

    def settled():
        held = [space for space in stats(address).namespaces if space.pages_ready]
        seen.append((len(held), sum(space.bytes_held for space in held)))
        return len(seen) > 10 and len(set(seen[-10:])) == 1

    eventually(settled, "pages are being written all the time")
    return seen[-1]


@pytest.fixture(scope="module")
def by_one_rank(tiny_mla, memory, stock):
    """What a server of one rank leaves in memory after PROMPTS."""
    with running_server(tiny_mla, (*BASE, *MODE, "--smg-memory", f"ipc://{memory}")) as server:
        assert ids(answers(server)) == stock[0]
        return in_memory(memory)


@pytest.fixture(scope="module")
def server(tiny_mla, memory, by_one_rank):
    args = ("--tp-size", "2", "--smg-memory", f"ipc://{memory}", "--smg-stream-context")
    with running_server(tiny_mla, (*BASE, *MODE, *args), DISTURBED) as running:
        yield running


def test_two_ranks_find_what_one_has_written(server, stock):
    """The first test: host memory has only what the other server left there."""
    found = answers(server)
    assert ids(found) == stock[0]
    whole = sum((len(prompt) - 1) // 16 * 16 for prompt in PROMPTS)
    assert sum(sum(details(result).values()) for result in found) >= 0.95 * whole


def test_two_ranks_leave_as_many_bytes_as_one(server, memory, stock, by_one_rank):
    server.flush()
    assert ids(answers(server)) == stock[0]
    assert in_memory(memory) == by_one_rank
    assert by_one_rank[0] == 1


def test_texts_are_stocks_from_host_memory(server, stock):
    answers(server)
    again = answers(server)
    assert ids(again) == stock[0]
    assert sum(details(result)["host"] for result in again) > 0
    with ThreadPoolExecutor(6) as pool:
        work = list(range(len(PROMPTS)))
        results = pool.map(lambda i: server.generate(PROMPTS[i], NEW_TOKENS), work)
        assert ids(results) == [stock[0][i] for i in work]


def test_two_ranks_stream_what_no_device_holds(server, stock):
    server.flush()
    work = [*STREAMED, 1]
    with ThreadPoolExecutor(3) as pool:
        texts = ids(pool.map(lambda index: ask_long(server, index), work))
    assert texts == [stock[1][index] for index in work]
    again = ask_long(server, 2)
    assert details(again) == {"device": 0, "host": len(LONG[2][0]) // 16 * 16}


def test_new_weights_are_found_by_both_ranks(server, tiny_mla, stock):
    update = server.post("/update_weights_from_disk", model_path=str(tiny_mla))
    assert update.json()["success"], update.text
    cold, again = answers(server), answers(server)
    assert ids(cold) == ids(again) == stock[0]
    assert sum(details(result)["host"] for result in cold[:10]) == 0, "of former weights"
    assert sum(details(result)["host"] for result in again) > 0
