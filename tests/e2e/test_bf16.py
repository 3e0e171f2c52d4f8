"""bf16: a host hit changes log-probabilities no more than another batching does."""

from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile

from tests.e2e.conftest import PROMPTS, details
from tests.e2e.test_host_tier import storm

SERVER_ARGS = ("--dtype", "bfloat16")
LONG = PROMPTS[:8]


def ask(server, prompt):
    return server.generate(prompt, 8, return_logprob=True)


def logprobs(result):
    return [(token, value) for value, token, _ in result["meta_info"]["output_token_logprobs"]]


def differences(one, other):
    """Absolute differences up to the first token that differs."""
    pairs = zip(logprobs(one), logprobs(other), strict=True)
    return [abs(a[1] - b[1]) for a, b in takewhile(lambda pair: pair[0][0] == pair[1][0], pairs)]


def test_a_host_hit_is_as_near_as_another_batching(server):
    server.flush()
    alone = [ask(server, prompt) for prompt in LONG]
    server.flush()
    with ThreadPoolExecutor(4) as pool:
        batched = list(pool.map(lambda prompt: ask(server, prompt), LONG))
    storm(server)
    again = [ask(server, prompt) for prompt in LONG]
    assert sum(details(result)["host"] for result in again) > 0
    noise = [d for a, b in zip(alone, batched, strict=True) for d in differences(a, b)]
    shift = [d for a, b in zip(alone, again, strict=True) for d in differences(a, b)]
    assert noise and shift
    # Twice the noise: two maxima of samples from one distribution differ, too.
    assert max(shift) <= 2 * max(noise) + 1e-3, (max(shift), max(noise))
    assert sum(shift) / len(shift) <= 2 * sum(noise) / len(noise) + 1e-3
