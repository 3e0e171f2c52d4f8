"""Modes of SGLang that no other test has: the texts of stock SGLang, also from host memory.

Minutes each: SMG_TEST_MODELS=1 (`make test-models`).
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.e2e.conftest import (
    DISTURBED,
    NEW_TOKENS,
    PROMPTS,
    SMG,
    assert_idle_and_clean,
    details,
    nothing_left_behind,
)
from tests.e2e.test_host_tier import answers, ids
from tools.sglang_server import running_server

pytestmark = pytest.mark.skipif(
    not os.environ.get("SMG_TEST_MODELS"), reason="takes minutes: make test-models"
)

MODES = {
    "mixed-chunk": ("--enable-mixed-chunk",),
    "lpm": ("--schedule-policy", "lpm"),
    "priorities": ("--enable-priority-scheduling",),
    "radix-priority": ("--radix-eviction-policy", "lfu"),
    "overlap-off": ("--disable-overlap-schedule",),
}


@pytest.mark.parametrize("mode", MODES)
def test_texts_are_stocks(tiny_model, reference, mode):
    args = (*SMG, *MODES[mode])
    with nothing_left_behind(), running_server(tiny_model, args, DISTURBED) as server:
        assert ids(answers(server)) == reference
        again = answers(server)
        assert ids(again) == reference
        assert sum(details(result)["host"] for result in again) > 0
        with ThreadPoolExecutor(6) as pool:
            work = list(range(len(PROMPTS))) * 2
            results = pool.map(lambda index: server.generate(PROMPTS[index], NEW_TOKENS), work)
            assert ids(results) == [reference[index] for index in work]
        assert_idle_and_clean(server)


def test_workers_of_data_parallelism_share_host_memory(tiny_model, reference):
    args = (*SMG, "--dp-size", "2", "--smg-host-gb", "0.5")
    with nothing_left_behind(), running_server(tiny_model, args, DISTURBED) as server:
        found = 0
        for _ in range(3):  # each time at another worker, or not
            results = answers(server)
            assert ids(results) == reference
            found += sum(details(result)["host"] for result in results)
        assert found > 0


def test_embeddings_are_stocks(tiny_model):
    def embeddings(extra):
        args = ("--dtype", "float32", "--is-embedding", "--log-level", "warning", *extra)
        with running_server(tiny_model, args) as server:
            asked = [*PROMPTS[:6], *PROMPTS[:6]]
            return [
                server.post("/encode", input_ids=prompt).json()["embedding"] for prompt in asked
            ]

    ours, stock = embeddings(("--enable-smg", "--smg-host-gb", "0.25")), embeddings(())
    np.testing.assert_allclose(ours, stock, atol=1e-4)
