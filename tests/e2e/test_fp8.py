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


@pytest.fixture
def disturbed(tiny_model, dtype, stock):
    """A server whose copies come late and whose requests are retracted."""
    with running_server(tiny_model, (*SMG, *dtype), DISTURBED) as server:
        yield server


@pytest.fixture
def calm(tiny_model, dtype):
    """Where nothing is retracted: a request that was, computes in batches of another shape."""
    with running_server(tiny_model, (*SMG, *dtype)) as server:
        yield server


def test_texts_are_stocks_cold_from_the_device_and_from_host_memory(disturbed, stock):
    assert ids(answers(disturbed)) == stock
    again = answers(disturbed)
    assert ids(again) == stock
    assert sum(details(result)["host"] for result in again) > 0
    with ThreadPoolExecutor(6) as pool:
        work = list(range(len(PROMPTS))) * 2
        results = pool.map(lambda index: disturbed.generate(PROMPTS[index], NEW_TOKENS), work)
        assert ids(results) == [stock[index] for index in work]
    assert_idle_and_clean(disturbed)


def test_a_host_hit_is_a_device_hit_to_the_last_bit_and_a_byte_an_element(calm, dtype):
    ask(calm, PROMPTS[0])
    on_device = ask(calm, PROMPTS[0])
    storm(calm)
    on_host = ask(calm, PROMPTS[0])
    assert details(on_host)["host"] == details(on_device)["device"] > 0
    assert logprobs(on_host) == logprobs(on_device)
    namespace = smg_state(calm)["namespace"]
    assert namespace["dtype"].startswith("float8") and dtype[1].split("_")[1] in namespace["dtype"]
    assert namespace["page_bytes"] == 16 * SHAPE.layers * 2 * SHAPE.kv_heads * SHAPE.head_dim
