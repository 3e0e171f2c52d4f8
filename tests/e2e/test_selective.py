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
    for prompt in PROMPTS[:4]:
        server.generate(prompt, 1)
        server.generate(prompt, 1)  # now it goes to host memory
    before = smg_state(server)["prefetched_tokens"]
    for attempt in range(10):
        assert ask_behind(server, 3 * attempt) == reference[:4]
        if smg_state(server)["prefetched_tokens"] > before:
            return
    raise AssertionError("nothing was loaded while it waited")


def ask_behind(server, seed):
    """Behind a prompt whose chunks fill the batches: the others wait, if they do not come first."""
    for fresh in (seed, seed + 1):
        server.generate(token_ids(700 + fresh, 1000), 1)  # none of the others stays on the device
    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(server.generate, token_ids(702 + seed, 3 * 512), 1)
        results = list(pool.map(lambda prompt: server.generate(prompt, NEW_TOKENS), PROMPTS[:4]))
        first.result()
    return ids(results)
