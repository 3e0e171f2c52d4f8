"""write_back: nothing is copied before the device evicts it, and then all of it. With retraction."""

from concurrent.futures import ThreadPoolExecutor

from tests.e2e.conftest import NEW_TOKENS, PROMPTS, details, eventually, metric, smg_state
from tests.e2e.test_host_tier import answers, ids, storm

SERVER_ARGS = ("--smg-write-policy", "write_back", "--smg-page-size", "32")
#: SGLang's own test switch: requests are retracted again and again while they decode.
SERVER_ENV = {"SGLANG_TEST_RETRACT": "1"}


def test_pages_are_written_when_they_are_evicted(server):
    server.flush()
    server.generate(PROMPTS[0], 1)
    assert smg_state(server)["memory"]["pages_ready"] == 0
    storm(server)
    assert smg_state(server)["memory"]["pages_ready"] >= len(PROMPTS[0]) // 32
    result = server.generate(PROMPTS[0], 1)
    assert details(result)["host"] >= len(PROMPTS[0]) // 32 * 32 - 32


def test_texts_are_stocks(server, reference):
    for _ in range(2):
        assert ids(answers(server)) == reference


def test_a_retracted_request_resumes_from_host_memory(server, reference):
    server.flush()
    before = metric(server, "smg:hit_tokens_total", tier="host")
    with ThreadPoolExecutor(6) as pool:
        results = list(
            pool.map(lambda i: server.generate(PROMPTS[i], NEW_TOKENS), [10, 11, 12, 13] * 3)
        )
    assert ids(results) == [reference[i] for i in [10, 11, 12, 13] * 3]
    assert sum(result["meta_info"]["num_retractions"] for result in results) > 0
    eventually(lambda: metric(server, "smg:hit_tokens_total", tier="host") > before, "no host hit")
