"""Contexts up to four times the device pool, on CUDA, in fp32: texts are those of a pool that holds
all, token for token, of keys and values and of latents (MLA). Skipped without CUDA.

SGLang's Triton kernels attend what is on the device; left to themselves they round float32 to TF32,
and texts would part where two tokens are nearly as likely.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.conftest import BASE, LONG, POOL_TOKENS, PROMPTS, assert_idle_and_clean, smg_state
from tests.e2e.conftest import NEW_TOKENS as NEW
from tools.sglang_server import running_server

pytestmark = pytest.mark.gpu

EXACT = {"TRITON_F32_DEFAULT": "ieee"}
STREAMED = (*BASE, "--enable-smg", "--smg-host-gb", "1", "--smg-stream-context")
ALL = [*LONG, *((prompt, NEW) for prompt in PROMPTS)]


@pytest.fixture(scope="module", params=["tiny_model", "tiny_mla"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def expected(model):
    args = (*BASE, "--max-total-tokens", "32768", "--attention-backend", "triton")
    with running_server(model, args, EXACT) as server:
        return [server.generate(prompt, new)["output_ids"] for prompt, new in ALL]


@pytest.fixture(scope="module", params=["0", "3"], ids=["as it is", "copies delayed"])
def server(request, model, expected):
    env = EXACT | {"SMG_TEST_COPY_DELAY_MS": request.param}
    with running_server(model, STREAMED, env) as server:
        yield server


def test_the_prompts_do_not_fit_the_device():
    assert max(len(prompt) for prompt, _ in LONG) > 3.9 * POOL_TOKENS


def test_each_text_is_that_of_a_pool_that_holds_all(server, expected):
    for (prompt, new), want in zip(LONG, expected, strict=False):
        assert server.generate(prompt, new)["output_ids"] == want
        # Found in host memory now, and streamed from there.
        assert server.generate(prompt, new)["output_ids"] == want


def test_streams_and_ordinary_requests_share_batches(server, expected):
    work = [index for index in range(len(ALL)) for _ in range(2)]
    random.Random(1).shuffle(work)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda index: server.generate(*ALL[index]), work))
    for index, got in zip(work, answers, strict=True):
        assert got["output_ids"] == expected[index]
    assert_idle_and_clean(server)
    assert smg_state(server)["streams"] == 0
