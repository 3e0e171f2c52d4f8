"""`POST /kv_hints`: hints about a prefix without a request (docs/hints.md).

A route of SGLang's own HTTP application, guarded as `/flush_cache` is. Main process only, on the
event loop of the HTTP server.
"""

from __future__ import annotations

import sys
from typing import Any

import msgspec

from smg_sglang.errors import SmgError
from smg_sglang.tier.hint_actions import TokenId

PATH = "/kv_hints"
_PROMPTS = ("text", "input_ids", "messages")


class BadHint(SmgError):
    """A body that is no hint, in one sentence for whoever sent it."""


class _Body(msgspec.Struct, forbid_unknown_fields=True):
    kv_hints: dict[str, Any]
    text: str | None = None
    input_ids: list[TokenId] | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    extra_key: str | None = None
    cache_salt: str | None = None


def add_route() -> None:
    """Add the route to SGLang's application where this process serves HTTP; idempotent."""
    server: Any = sys.modules.get("sglang.srt.entrypoints.http_server")
    if server is None or any(getattr(route, "path", None) == PATH for route in server.app.routes):
        return
    from sglang.srt.utils.auth import AuthLevel, auth_level

    from smg_sglang.engine.cache import hint_messages

    hint_messages.register()
    route = auth_level(AuthLevel.ADMIN_OPTIONAL)(make_handler(server.get_global_state))
    server.app.add_route(PATH, route, methods=["POST"])


def make_handler(global_state: Any) -> Any:
    """The route's handler; `global_state` gives SGLang's, once it serves."""
    from fastapi import Request
    from fastapi.responses import JSONResponse

    asking: list[Any] = []

    async def kv_hints(request: Request) -> JSONResponse:
        """Tell every worker; answer what became of each action, by worker."""
        manager = global_state().tokenizer_manager
        manager.auto_create_handle_loop()
        if not asking:
            asking.append(_communicator(manager))
        chat = getattr(request.app.state, "openai_serving_chat", None)
        try:
            message = read_body(await request.body(), manager.tokenizer, chat)
        except BadHint as error:
            return JSONResponse({"error": {"message": str(error)}}, status_code=400)
        answers = await asking[0](message)
        return JSONResponse({"outcomes": [answer.outcomes for answer in answers]})

    return kv_hints


def _communicator(manager: Any) -> Any:
    """Sends to all workers and awaits an answer of each, as for SGLang's own orders."""
    from sglang.srt.managers.communicator import FanOutCommunicator
    from sglang.srt.runtime_context import get_parallel
    from sglang.utils import TypeBasedDispatcher

    from smg_sglang.engine.cache.hint_messages import KvHintsReqOutput

    ask: Any = FanOutCommunicator(manager._dispatch_to_scheduler, get_parallel().num_dp_ranks)
    manager._result_dispatcher += TypeBasedDispatcher([(KvHintsReqOutput, ask.handle_recv)])
    return ask


def read_body(data: bytes, tokenizer: Any, chat: Any) -> Any:
    """The message to the workers.

    Args:
        tokenizer: the server's; None where it has none.
        chat: SGLang's chat endpoint, which knows how messages become a prompt.

    Raises:
        BadHint: the body is none.
    """
    from sglang.srt.managers.kv_hints import decode_kv_hints_envelope

    from smg_sglang.engine.cache.hint_messages import KvHintsReqInput

    try:
        body = msgspec.json.decode(data, type=_Body)
        envelope = decode_kv_hints_envelope(body.kv_hints)
    except ValueError as error:  # msgspec's are, too
        raise BadHint(f"the body is no hint: {error}") from None
    return KvHintsReqInput(
        input_ids=_tokens(body, tokenizer, chat),
        kv_hints=envelope,
        extra_key=body.extra_key,
        cache_salt=body.cache_salt,
    )


def _tokens(body: _Body, tokenizer: Any, chat: Any) -> list[int]:
    given = [name for name in _PROMPTS if getattr(body, name) is not None]
    if len(given) > 1:
        raise BadHint(f"give one of {' and '.join(given)}, not both")
    if body.input_ids is not None or not given:
        return body.input_ids or []
    if tokenizer is None:
        raise BadHint("this server has no tokenizer: give input_ids")
    if body.text is not None:
        return list(tokenizer.encode(body.text))
    return _chat_tokens(body, tokenizer, chat)


def _chat_tokens(body: _Body, tokenizer: Any, chat: Any) -> list[int]:
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

    try:
        request = ChatCompletionRequest(
            messages=body.messages,
            tools=body.tools,
            chat_template_kwargs=body.chat_template_kwargs,
        )
        ids = chat._process_messages(request, False).prompt_ids
    except Exception as error:  # whatever a chat template raises
        raise BadHint(f"the messages make no prompt: {error}") from None
    return list(tokenizer.encode(ids) if isinstance(ids, str) else ids)
