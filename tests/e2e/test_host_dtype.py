"""Host memory in fp8: half the bytes, a text near that of a device hit, and always the same one."""

from tests.e2e.conftest import details, smg_state
from tests.e2e.test_bf16 import LONG, ask, logprobs
from tests.e2e.test_host_tier import storm
from tools.models.dense import Recipe

SERVER_ARGS = ("--dtype", "bfloat16", "--smg-host-dtype", "fp8")
SHAPE = Recipe()
#: Of a log-probability: e4m3 has 4 bits, and the random model's next tokens lie close together.
NEAR = 0.3


def test_a_token_takes_half_the_bytes_and_its_scales(server):
    heads, dim = SHAPE.kv_heads, SHAPE.head_dim
    kind = smg_state(server)["layers"]["full"]
    assert kind["bytes_a_token"] == kind["layers"] * 2 * heads * (dim + 1)


def test_a_host_hit_is_near_a_device_hit_and_the_same_each_time(server):
    server.flush()
    for prompt in LONG:
        ask(server, prompt)
    on_device = [ask(server, prompt) for prompt in LONG]
    hits = []
    for _ in range(2):
        storm(server)
        hits.append([ask(server, prompt) for prompt in LONG])
    for results in hits:
        assert [details(result)["host"] for result in results] == [
            details(result)["device"] for result in on_device
        ]
    assert [logprobs(result) for result in hits[0]] == [logprobs(result) for result in hits[1]]
    first = [[logprobs(result)[0] for result in results] for results in (hits[0], on_device)]
    assert all(abs(a[1] - b[1]) < NEAR for a, b in zip(*first, strict=True))
    assert first[0] != first[1], "nothing was rounded"
