"""bf16: a host hit computes what a device hit does, to the last bit of every log-probability."""

from tests.e2e.conftest import PROMPTS, details
from tests.e2e.test_host_tier import storm

SERVER_ARGS = ("--dtype", "bfloat16")
LONG = PROMPTS[:2]


def ask(server, prompt):
    return server.generate(prompt, 8, return_logprob=True)


def logprobs(result):
    return [(token, value) for value, token, _ in result["meta_info"]["output_token_logprobs"]]


def test_a_host_hit_is_a_device_hit(server):
    """Stronger than to stay within the noise of another batching, which changes with the load."""
    server.flush()
    for prompt in LONG:
        ask(server, prompt)
    on_device = [ask(server, prompt) for prompt in LONG]
    storm(server)
    on_host = [ask(server, prompt) for prompt in LONG]
    assert [details(result)["host"] for result in on_device] == [0, 0]
    assert [details(result)["host"] for result in on_host] == [
        details(result)["device"] for result in on_device
    ]
    assert [logprobs(result) for result in on_host] == [logprobs(result) for result in on_device]
