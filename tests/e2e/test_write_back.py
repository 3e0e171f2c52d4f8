"""write_back: nothing is copied before the device evicts it, and then all of it. With retraction."""

from concurrent.futures import ThreadPoolExecutor

from tests.e2e.conftest import PROMPTS, RETRACTIONS, details, smg_state
from tests.e2e.test_host_tier import answers, ids, storm

SERVER_ARGS = ("--smg-write-policy", "write_back", "--smg-page-size", "32")
SERVER_ENV = RETRACTIONS


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


def test_a_retracted_request_resumes_from_host_memory(server):
    """Its prompt is in the tree; what it has generated since is only where retraction put it."""
    work = [10, 11, 12, 13] * 2
    serial = {i: server.generate(PROMPTS[i], 100)["output_ids"] for i in set(work)}
    server.flush()
    before = smg_state(server)["hit_tokens"].get("host", 0)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: server.generate(PROMPTS[i], 100), work))
    assert ids(results) == [serial[i] for i in work]
    assert sum(result["meta_info"]["num_retractions"] for result in results) > 0
    assert smg_state(server)["hit_tokens"].get("host", 0) > before, "no host hit"
