"""Questions to one new document at once: it is computed once, and the answers stay what they are."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from tests.e2e.conftest import NEW_TOKENS, PROMPTS, eventually, metric, smg_state, token_ids
from tests.e2e.test_host_tier import answers, ids

#: A chunk holds more than one document: without waiting, questions would share it.
SERVER_ARGS = ("--max-running-requests", "12", "--chunked-prefill-size", "2048")
DOCUMENT, QUESTION, QUESTIONS = 1200, 40, 8


def ask_at_once(server, prompts, new=NEW_TOKENS):
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda prompt: server.generate(prompt, new), prompts))


def computed(results):
    """Prompt tokens that were not found anywhere."""
    return sum(r["meta_info"]["prompt_tokens"] - r["meta_info"]["cached_tokens"] for r in results)


def questions(seed):
    document = token_ids(seed, DOCUMENT)
    return [document + token_ids(seed + 1 + n, QUESTION) for n in range(QUESTIONS)]


def test_eight_questions_to_a_new_document_cost_one_prefill(server):
    prompts = questions(5000)
    results = ask_at_once(server, prompts)
    assert computed(results) <= 1.15 * (DOCUMENT + QUESTIONS * QUESTION)
    eventually(lambda: metric(server, "smg:waited_requests_total") >= QUESTIONS - 2, "none waited")
    assert metric(server, "smg:wait_saved_tokens_total") >= (QUESTIONS - 2) * DOCUMENT * 0.9
    server.flush()
    assert ids([server.generate(prompt, NEW_TOKENS) for prompt in prompts]) == ids(results)


def test_the_same_prompt_at_once_is_computed_once(server):
    prompt = token_ids(5100, 900)
    results = ask_at_once(server, [prompt] * 6)
    assert len({tuple(r["output_ids"]) for r in results}) == 1
    assert computed(results) <= 900 + 6 * 17


def test_who_waited_for_a_request_that_is_aborted_goes_on(server):
    """Whether it has begun or not, and whatever was computed of it until then."""
    prompts = questions(5200)
    first = threading.Thread(
        target=lambda: requests.post(
            f"{server.url}/generate",
            json={
                "input_ids": prompts[0],
                "rid": "leader",
                "sampling_params": {"max_new_tokens": 400},
            },
            timeout=60,
        )
    )
    first.start()
    with ThreadPoolExecutor(4) as pool:
        rest = [pool.submit(server.generate, prompt, 4) for prompt in prompts[1:5]]
        server.post("/abort_request", rid="leader")
        results = [each.result(timeout=60) for each in rest]
    first.join(timeout=60)
    assert all(len(result["output_ids"]) == 4 for result in results)


def test_texts_under_overload_are_those_of_a_pool_that_holds_all(server, reference):
    """Every prompt at once and several times, more than run at once: all end, none waits for ever."""
    with ThreadPoolExecutor(24) as pool:
        work = list(range(len(PROMPTS))) * 3
        results = list(pool.map(lambda n: server.generate(PROMPTS[n], NEW_TOKENS), work))
    assert [r["output_ids"] for r in results] == [reference[n] for n in work]
    assert ids(answers(server)) == reference
    assert smg_state(server)["leases_held"] == 0


@pytest.fixture(autouse=True, scope="module")
def cold(server):
    server.flush()
