"""write_back: nothing is copied before the device evicts it, and then all of it. With retraction."""

from tests.e2e.conftest import NEW_TOKENS, PROMPTS, details, smg_state
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


def test_texts_are_stocks_under_retraction(server, reference):
    for _ in range(2):
        assert ids(answers(server)) == reference
    assert server.generate(PROMPTS[1], NEW_TOKENS)["output_ids"] == reference[1]
