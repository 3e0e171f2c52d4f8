"""selective: a prefix is copied on its second use. Page size 1, mixed chunks, late copies, and loads
for requests that wait."""

import random
from concurrent.futures import ThreadPoolExecutor

from tests.e2e.conftest import NEW_TOKENS, PROMPTS, details, eventually, smg_state, token_ids
from tests.e2e.test_host_tier import answers, ids, storm

SERVER_ARGS = (
    *("--smg-write-policy", "selective", "--page-size", "1"),
    *("--enable-mixed-chunk", "--schedule-policy", "lpm", "--smg-prefetch"),
)
#: Every copy starts up to this late, so that a missing wait shows as a wrong text.
SERVER_ENV = {"SMG_TEST_COPY_DELAY_MS": "10"}


def test_a_prefix_is_kept_on_its_second_use(server):
    server.flush()
    server.generate(PROMPTS[0], 1)
    assert smg_state(server)["memory"]["pages_ready"] == 0
    server.generate(PROMPTS[0], 1)
    eventually(
        lambda: smg_state(server)["memory"]["pages_ready"] >= len(PROMPTS[0]) - 1, "not written"
    )
    storm(server)
    assert details(server.generate(PROMPTS[0], 1))["host"] >= len(PROMPTS[0]) - 1


def test_texts_are_stocks(server, reference):
    for _ in range(2):
        assert ids(answers(server)) == reference


def test_texts_are_stocks_while_others_are_aborted(server, reference):
    with ThreadPoolExecutor(8) as pool:
        rng = random.Random(3)
        work = [rng.randrange(len(PROMPTS)) for _ in range(40)]
        futures = [
            pool.submit(server.generate, PROMPTS[i], 12, rid=f"r{n}") for n, i in enumerate(work)
        ]
        for n in range(0, 40, 3):
            server.post("/abort_request", rid=f"r{n}")
        for n, (i, future) in enumerate(zip(work, futures, strict=True)):
            result = future.result()
            if result["meta_info"]["finish_reason"]["type"] != "abort":
                assert result["output_ids"] == reference[i], n


def test_texts_are_stocks_where_prefixes_came_while_requests_waited(server, reference):
    """A prompt in chunks fills the batches, behind which the others wait."""
    for _ in range(2):
        answers(server)  # all of it is in host memory
    before = smg_state(server)["prefetched_tokens"]
    with ThreadPoolExecutor(len(PROMPTS) + 1) as pool:
        first = pool.submit(server.generate, token_ids(700, 900), 1)
        results = list(pool.map(lambda prompt: server.generate(prompt, NEW_TOKENS), PROMPTS))
        first.result()
    assert ids(results) == reference
    assert smg_state(server)["prefetched_tokens"] > before
