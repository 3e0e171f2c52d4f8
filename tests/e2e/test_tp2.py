"""Two tensor-parallel ranks: each keeps its shard, and both agree on every hit."""

from concurrent.futures import ThreadPoolExecutor

from tests.e2e.conftest import NEW_TOKENS, PROMPTS, details, smg_state
from tests.e2e.test_host_tier import answers, ids

SERVER_ARGS = ("--tp-size", "2")


def test_two_ranks_load_back_what_they_spilled(server):
    server.flush()
    cold = ids(answers(server))
    again = answers(server)
    assert ids(again) == cold
    assert sum(details(result)["host"] for result in again) > 0
    with ThreadPoolExecutor(6) as pool:
        work = list(range(len(PROMPTS))) * 2
        results = pool.map(lambda i: server.generate(PROMPTS[i], NEW_TOKENS), work)
        assert ids(results) == [cold[i] for i in work]
    assert smg_state(server)["namespace"]["tp_size"] == 2
