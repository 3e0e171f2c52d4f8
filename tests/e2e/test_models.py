"""Models whose layers differ: what comes back from host memory gives, token for token, what the
model itself says (transformers, fp32), whatever happened to it in between."""

import dataclasses
import os
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.e2e.conftest import (
    BASE,
    DISTURBED,
    NEW_TOKENS,
    assert_idle_and_clean,
    details,
    nothing_left_behind,
    smg_state,
    token_ids,
)
from tools.models import RECIPES
from tools.models.recipe import random_model
from tools.sglang_server import running_server

#: What the CI does not take the time for: `make test-models`.
FAMILIES = ["swa", "hybrid", *(["dense", "mla"] if os.environ.get("SMG_TEST_MODELS") else [])]
#: As BASE has it.
CHUNK = 512
SERVERS = [("--page-size", "16")]
if os.environ.get("SMG_TEST_MODELS"):  # `make test-models`, which takes minutes
    SERVERS += [("--page-size", "1"), ("--page-size", "64"), ("--tp-size", "2")]

#: Longer and shorter than the window of 64, whole pages and not, shared prefixes that part within a
#: chunk, at its end and after it.
PROMPTS = [
    *(token_ids(500 + seed, 330 + 91 * seed) for seed in range(6)),
    token_ids(510, 512),
    token_ids(511, 50),
    *(token_ids(512, 600) + token_ids(520 + seed, 70) for seed in range(3)),
    token_ids(512, 512) + token_ids(530, 64),
    token_ids(512, 300),
]


def folder(family):
    return random_model(dataclasses.replace(RECIPES[family], dtype="float32"))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def oracle(family):
    """What the model says to each prompt, computed without a cache of ours or SGLang's."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder(family), dtype=torch.float32)
    said = []
    for prompt in PROMPTS:
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )
        said.append(out[0, len(prompt) :].tolist())
    return said


@pytest.fixture(scope="module", params=SERVERS, ids="".join)
def mixed(request, family):
    """A server for the family whose copies come late and whose requests are retracted."""
    args = (*BASE, "--enable-smg", "--smg-host-gb", "0.25", "--log-level", "warning")
    model, shape = folder(family), request.param
    if family == "hybrid" and "--page-size" in shape:
        if shape != SERVERS[0]:
            pytest.skip("SGLang keeps this model's states with pages of one token only")
        shape = ()
    # By default SGLang rounds the states of convolutions to bfloat16.
    environment = {**DISTURBED, "SGLANG_MAMBA_CONV_DTYPE": "float32"}
    with nothing_left_behind(), running_server(model, (*args, *shape), environment) as server:
        yield server


def ask(server, index):
    return server.generate(PROMPTS[index], NEW_TOKENS)


def texts(answers):
    return [answer["output_ids"] for answer in answers]


def test_what_is_computed_is_what_the_model_says(mixed, oracle):
    mixed.flush()
    assert texts(ask(mixed, index) for index in range(len(PROMPTS))) == oracle


def most_found(family, prompt, page):
    """Tokens of a prompt that can be found when it is asked again. Of states there are those of the
    ends of prompts, answers and chunks."""
    if family == "hybrid":
        return (len(prompt) - 1) // CHUNK * CHUNK
    return (len(prompt) - 1) // page * page


def test_device_hits_say_the_same(mixed, oracle):
    mixed.flush()  # a state that came from host memory is its request's, and goes on with it
    for index in (3, 4, 5):
        ask(mixed, index)
        again = ask(mixed, index)
        assert again["output_ids"] == oracle[index]
        assert details(again)["device"] > 0


def test_host_hits_say_the_same(mixed, oracle, family):
    mixed.flush()
    for index in range(len(PROMPTS)):
        ask(mixed, index)
    again = [ask(mixed, index) for index in range(len(PROMPTS))]
    assert texts(again) == oracle
    found = [sum(details(answer).values()) for answer in again]
    page = smg_state(mixed)["namespace"]["page_size"]
    wanted = [most_found(family, prompt, page) for prompt in PROMPTS]
    assert sum(details(answer)["host"] for answer in again) > 0
    assert sum(found) > 0.9 * sum(wanted)


def test_conversations_go_on_from_host_memory(mixed, oracle):
    """Each answer is part of the next prompt, and has left the device meanwhile."""
    mixed.flush()
    question = token_ids(540, 40)
    first = [ask(mixed, index)["output_ids"] for index in range(6)]
    prompts = [PROMPTS[index] + first[index] + question for index in range(6)]
    second = [mixed.generate(prompt, NEW_TOKENS) for prompt in prompts]
    page = smg_state(mixed)["namespace"]["page_size"]
    for answer, prompt in zip(second, prompts, strict=True):
        # The newest token of an answer has no KV.
        known = (len(prompt) - len(question) - 1) // page * page
        assert sum(details(answer).values()) >= known - page
    assert sum(details(answer)["host"] for answer in second) > 0
    mixed.flush()
    assert texts(mixed.generate(prompt, NEW_TOKENS) for prompt in prompts) == texts(second)


def test_a_storm_of_requests_says_the_same(mixed, oracle):
    rng = random.Random(1)
    work = [rng.randrange(len(PROMPTS)) for _ in range(60)]
    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(lambda index: ask(mixed, index), work))
    assert texts(answers) == [oracle[index] for index in work]
    assert_idle_and_clean(mixed)


def test_host_bytes_are_told_by_kind_of_layer(mixed, family):
    kinds = smg_state(mixed)["layers"]
    others = {"swa": {"window"}, "hybrid": {"state"}}
    assert kinds.keys() == {"full"} | others.get(family, set())
    assert sum(kind["layers"] for kind in kinds.values()) == RECIPES[family].layers
