"""KV in fp8 is moved as it is: a byte an element, and the text of a pool that holds all."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.conftest import (
    DISTURBED,
    NEW_TOKENS,
    PROMPTS,
    SMG,
    assert_idle_and_clean,
    details,
    smg_state,
)
from tests.e2e.test_bf16 import ask, logprobs
from tests.e2e.test_host_tier import answers, ids, storm
from tools.models.dense import Recipe
from tools.sglang_server import running_server

#: Both take two minutes more: SMG_TEST_MODELS=1 (`make test-models`).
DTYPES = ["fp8_e4m3", "fp8_e5m2"] if os.environ.get("SMG_TEST_MODELS") else ["fp8_e4m3"]
SHAPE = Recipe()


@pytest.fixture(scope="module", params=DTYPES)
def dtype(request):
    return ("--kv-cache-dtype", request.param)


@pytest.fixture(scope="module")
def stock(tiny_model, dtype):
    """What SGLang answers without a host tier, its pool holding all."""
    args = ("--dtype", "float32", "--max-total-tokens", "32768", "--log-level", "warning")
    with running_server(tiny_model, (*args, *dtype)) as server:
        return ids(answers(server))


@pytest.fixture(scope="module")
def fp8(tiny_model, dtype, stock):
    """A server whose copies come late and whose requests are retracted."""
    with running_server(tiny_model, (*SMG, *dtype), DISTURBED) as server:
        yield server


def test_texts_are_stocks_cold_from_the_device_and_from_host_memory(fp8, stock):
    assert ids(answers(fp8)) == stock
    again = answers(fp8)
    assert ids(again) == stock
    assert sum(details(result)["host"] for result in again) > 0
    with ThreadPoolExecutor(6) as pool:
        work = list(range(len(PROMPTS))) * 2
        results = pool.map(lambda index: fp8.generate(PROMPTS[index], NEW_TOKENS), work)
        assert ids(results) == [stock[index] for index in work]
    assert_idle_and_clean(fp8)


def test_a_host_hit_is_a_device_hit_to_the_last_bit(fp8):
    ask(fp8, PROMPTS[0])
    on_device = ask(fp8, PROMPTS[0])
    storm(fp8)
    on_host = ask(fp8, PROMPTS[0])
    assert details(on_host)["host"] == details(on_device)["device"] > 0
    assert logprobs(on_host) == logprobs(on_device)


def test_an_element_is_a_byte_in_host_memory(fp8, dtype):
    namespace = smg_state(fp8)["namespace"]
    assert namespace["dtype"].startswith("float8") and dtype[1].split("_")[1] in namespace["dtype"]
    assert namespace["page_bytes"] == 16 * SHAPE.layers * 2 * SHAPE.kv_heads * SHAPE.head_dim
