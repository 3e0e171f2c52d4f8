"""selective: a prefix is copied on its second use. Page size 1, mixed chunks."""

from tests.e2e.conftest import PROMPTS, details, eventually, smg_state
from tests.e2e.test_host_tier import answers, ids, storm

SERVER_ARGS = (
    *("--smg-write-policy", "selective", "--page-size", "1"),
    *("--enable-mixed-chunk", "--schedule-policy", "lpm"),
)


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
