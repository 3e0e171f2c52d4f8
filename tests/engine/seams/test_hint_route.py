"""`POST /kv_hints`: what is read of a body, who may send it, and what comes back."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sglang.srt.utils.auth import AuthLevel, add_api_key_middleware, auth_level
from sglang.utils import TypeBasedDispatcher

from smg_sglang.engine.cache import hint_messages
from smg_sglang.engine.cache.hint_messages import KvHintsReqInput, KvHintsReqOutput
from smg_sglang.engine.seams import hint_route
from smg_sglang.engine.seams.hint_route import BadHint, read_body
from smg_sglang.engine.split import wire

HINTS = {"protocol_version": "1", "message_id": "m", "actions": []}


class Tokenizer:
    def encode(self, text):
        return list(text.encode())


class Chat:
    """SGLang's chat endpoint, as far as prompts go."""

    def _process_messages(self, request, is_multimodal):
        assert not is_multimodal
        said = "".join(message.content for message in request.messages)
        tools = [tool.function.name for tool in request.tools or ()]
        return SimpleNamespace(prompt_ids=[len(said), *map(len, tools)])


def read(body, tokenizer=None, chat=None):
    return read_body(json.dumps(body).encode(), tokenizer or Tokenizer(), chat or Chat())


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ({"input_ids": [1, 2]}, [1, 2]),
        ({"text": "ab"}, [97, 98]),
        ({"messages": [{"role": "user", "content": "hello"}]}, [5]),
        (
            {
                "messages": [{"role": "user", "content": "hello"}],
                "tools": [{"type": "function", "function": {"name": "look"}}],
            },
            [5, 4],
        ),
        ({}, []),
    ],
)
def test_a_prefix_is_given_as_tokens_text_or_messages(prompt, tokens):
    message = read({"kv_hints": HINTS, "cache_salt": "tenant", **prompt})
    assert message.input_ids == tokens
    assert (message.cache_salt, message.extra_key) == ("tenant", None)
    assert message.kv_hints.message_id == "m"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "required field `kv_hints`"),
        ({"kv_hints": []}, "the body is no hint"),
        ({"kv_hints": {"actions": []}}, "Malformed kv_hints envelope"),
        ({"kv_hints": HINTS, "text": "a", "input_ids": [1]}, "one of text and input_ids, not both"),
        ({"kv_hints": HINTS, "input_ids": [-1]}, "the body is no hint"),
        ({"kv_hints": HINTS, "input_ids": [1 << 63]}, "the body is no hint"),
        ({"kv_hints": HINTS, "messages": [{"role": "nobody"}]}, "the messages make no prompt"),
        ({"kv_hints": HINTS, "typo": 1}, "unknown field `typo`"),
    ],
)
def test_other_bodies_are_refused_in_a_sentence(body, says):
    with pytest.raises(BadHint, match=says):
        read(body)
    with pytest.raises(BadHint, match="the body is no hint"):
        read_body(b"{", Tokenizer(), Chat())


def test_without_a_tokenizer_only_tokens_will_do():
    with pytest.raises(BadHint, match="give input_ids"):
        read_body(json.dumps({"kv_hints": HINTS, "text": "a"}).encode(), None, Chat())


class Manager:
    """A tokenizer manager in front of two workers, which answer at once."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer()
        self._result_dispatcher = TypeBasedDispatcher([])
        self.sent = []

    def auto_create_handle_loop(self):
        pass

    def _dispatch_to_scheduler(self, message):
        self.sent.append(message)
        for worker in ("first", "second"):
            answer = KvHintsReqOutput(outcomes=[worker])
            asyncio.get_running_loop().call_soon(self._result_dispatcher, answer)


@pytest.fixture
def manager(monkeypatch):
    from sglang.srt import runtime_context

    monkeypatch.setattr(runtime_context, "get_parallel", lambda: SimpleNamespace(num_dp_ranks=2))
    return Manager()


def app_of(manager):
    app = FastAPI()
    handler = hint_route.make_handler(lambda: SimpleNamespace(tokenizer_manager=manager))
    app.add_route(hint_route.PATH, auth_level(AuthLevel.ADMIN_OPTIONAL)(handler), methods=["POST"])
    return app


def test_every_worker_is_told_and_answers(manager):
    with TestClient(app_of(manager)) as client:
        for _ in range(2):
            answer = client.post("/kv_hints", json={"kv_hints": HINTS, "text": "a"})
            assert (answer.status_code, answer.json()) == (
                200,
                {"outcomes": [["first"], ["second"]]},
            )
        assert client.post("/kv_hints", content=b"?").status_code == 400
    assert [type(message) for message in manager.sent] == [KvHintsReqInput] * 2


@pytest.mark.parametrize(
    ("keys", "sent", "status"),
    [
        ({"api_key": "user", "admin_api_key": "admin"}, "admin", 200),
        ({"api_key": "user", "admin_api_key": "admin"}, "user", 401),
        ({"api_key": None, "admin_api_key": "admin"}, None, 401),
        ({"api_key": "user", "admin_api_key": None}, "user", 200),
    ],
)
def test_who_may_flush_the_cache_may_send_hints(manager, keys, sent, status):
    app = app_of(manager)
    add_api_key_middleware(app, **keys)
    headers = {} if sent is None else {"Authorization": f"Bearer {sent}"}
    with TestClient(app) as client:
        answer = client.post("/kv_hints", json={"kv_hints": HINTS}, headers=headers)
    assert answer.status_code == status


def test_the_route_is_added_once_and_guarded(monkeypatch):
    import sys

    app = FastAPI()
    server = SimpleNamespace(app=app, get_global_state=lambda: None)
    monkeypatch.setitem(sys.modules, "sglang.srt.entrypoints.http_server", server)
    for _ in range(2):
        hint_route.add_route()
    (route,) = [route for route in app.routes if getattr(route, "path", None) == "/kv_hints"]
    assert route.endpoint._auth_level is AuthLevel.ADMIN_OPTIONAL


def test_a_process_without_http_has_no_route(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sglang.srt.entrypoints.http_server", None)
    hint_route.add_route()


def test_a_split_awaits_the_answers_of_its_workers():
    from sglang.srt.managers.kv_hints import decode_kv_hints_envelope

    hint_messages.register()
    message = KvHintsReqInput(input_ids=[1], kv_hints=decode_kv_hints_envelope(HINTS))
    assert wire.answer_type(message) == "KvHintsReqOutput"
    assert wire.decode(wire.encode(message)) == message
