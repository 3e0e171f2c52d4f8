"""SGLang's messages as the phase controller needs them: read, copied, answered for others."""

from __future__ import annotations

import pickle
import zlib
from array import array
from typing import Any

import msgspec
from sglang.srt.managers import io_struct
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchTokenIDOutput,
    FlushCacheReqOutput,
    GetInternalStateReqOutput,
    TokenizedGenerateReqInput,
)

from smg_sglang.phase.prefixes import path_of
from smg_sglang.phase.requests import Arrival


class Original:
    """A request as it came: `data` is what a decode worker is sent.

    `message` is its decoded form, needed only until a copy was made of it.
    """

    __slots__ = ("data", "message")

    def __init__(self, data: bytes, message: Any) -> None:
        self.data = data
        self.message = message


def decode(data: bytes) -> Any:
    """The message in `data`; raises what msgspec or pickle raise."""
    return pickle.loads(data) if io_struct._USE_PICKLE_IPC else io_struct.msgpack_decode(data)


def encode(message: Any) -> bytes:
    """The inverse of `decode`."""
    if io_struct._USE_PICKLE_IPC:
        return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return io_struct.msgpack_encode(message)


def arrival(original: Original, decode_workers: range) -> Arrival:
    """What the controller wants to know of a request."""
    message = original.message
    tokens = message.input_ids if message.input_ids is not None else array("q")
    session = getattr(message, "session_id", None) or _session_of(message)
    splittable = session is None and is_splittable(message)
    path = b""
    if splittable:
        namespace = f"{message.extra_key or ''}/{message.lora_id or ''}"
        path = path_of(tokens, namespace, message.cache_salt)
    return Arrival(
        rid=message.rid,
        prompt_tokens=len(tokens),
        splittable=splittable,
        path=path,
        home=None if session is None else home_of(session, decode_workers),
        payload=original,
    )


def _session_of(message: Any) -> str | None:
    params = getattr(message, "session_params", None)
    return None if params is None else params.id


def home_of(session: str, decode_workers: range) -> int:
    """The decode worker of a session: the same for all its requests."""
    return decode_workers[zlib.crc32(session.encode()) % len(decode_workers)]


#: Fields that make a request's KV or its answer depend on more than its token ids.
_UNSPLITTABLE = (
    "input_embeds",
    "mm_inputs",
    "token_type_ids",
    "positional_embed_overrides",
    "multi_item_delimiter_indices",
    "token_indices_to_pool",
    "need_wait_for_mm_inputs",
    "return_routed_experts",
    "return_indexer_topk",
    "bootstrap_room",
)


def is_splittable(message: Any) -> bool:
    """Whether a prefill worker can do the prompt, and nothing of the answer is lost by it."""
    if not isinstance(message, TokenizedGenerateReqInput) or message.input_ids is None:
        return False
    if any(getattr(message, name, None) for name in _UNSPLITTABLE):
        return False
    if (message.sampling_params.beam_width or 1) > 1:
        return False
    # Log-probabilities and hidden states of prompt tokens come from computing them.
    wants_prompt = message.return_logprob and message.logprob_start_len not in (-1, None)
    return not wants_prompt and not message.return_hidden_states


def make_copy(message: TokenizedGenerateReqInput, copy_rid: str) -> bytes:
    """The same prompt, to end after one token, with nothing that its answer alone would need."""
    sampling = msgspec.structs.replace(
        message.sampling_params,
        **{"max_new_tokens": 1, "min_new_tokens": 0, "n": 1, "top_k": 1, "temperature": 1.0},
        **{"top_p": 1.0, "min_p": 0.0, "frequency_penalty": 0.0, "presence_penalty": 0.0},
        **{"repetition_penalty": 1.0, "stop_token_ids": None, "stop_strs": []},
        **{"stop_regex_strs": [], "stop_str_max_len": 0, "stop_regex_max_len": 0},
        **{"json_schema": None, "regex": None, "ebnf": None, "structural_tag": None},
        **{"logit_bias": None, "custom_params": None, "watermark": None},
        **{"stream_interval": None, "ignore_eos": True},
    )
    copy = msgspec.structs.replace(
        message,
        rid=copy_rid,
        input_text=None,
        sampling_params=sampling,
        return_logprob=False,
        logprob_start_len=-1,
        top_logprobs_num=0,
        token_ids_logprob=None,
        return_sampling_mask=False,
        return_entropy=False,
        stream=False,
        custom_logit_processor=None,
        require_reasoning=False,
        routed_dp_rank=None,
        kv_hints=None,  # the original has them
        no_logs=True,
    )
    return encode(copy)


def without_rank(original: Original) -> Original:
    """Ranks are the controller's own business: one that a client asks for is ignored."""
    if getattr(original.message, "routed_dp_rank", None) is None:
        return original
    message = msgspec.structs.replace(original.message, routed_dp_rank=None)
    return Original(encode(message), message)


# ---- answers that no worker gives ----

SERVICE_UNAVAILABLE = 503


def failure(message: str) -> dict[str, Any]:
    """A finish reason that clients get as an error object with HTTP status 503."""
    return {
        "type": "abort",
        "message": message,
        "status_code": SERVICE_UNAVAILABLE,
        "err_type": "WorkerDied",
    }


def abort_answer(rid: str) -> bytes:
    """What the tokenizer process is told of a request that was aborted before it ran."""
    return encode(AbortReq(rid=rid))


def failed_answer(rid: str, message: str) -> bytes:
    """The last output of a request that failed. It goes by the detokenizer, which has to forget
    the request: its rid may come again."""
    known = {
        "rids": [rid],
        "http_worker_ipcs": [None],
        "finished_reasons": [failure(message)],
        "decoded_texts": [""],
        "decode_ids": [array("q")],
        "read_offsets": [0],
        "output_ids": [array("q")],
        "skip_special_tokens": [True],
        "spaces_between_special_tokens": [True],
        "no_stop_trim": [True],
        "prompt_tokens": [0],
        "reasoning_tokens": [0],
        "completion_tokens": [0],
        "cached_tokens": [0],
        "retraction_counts": [0],
    }
    return encode(BatchTokenIDOutput(**{**dict.fromkeys(_required_fields()), **known}))


def _required_fields() -> list[str]:
    return [
        field.name
        for field in msgspec.structs.fields(BatchTokenIDOutput)
        if field.default is msgspec.NODEFAULT and field.default_factory is msgspec.NODEFAULT
    ]


# ---- control messages ----


def answer_type(message: Any) -> str | None:
    """The name of the type in which a worker answers a control message; None for no answer."""
    name = type(message).__name__
    for candidate in (name.replace("Input", "Output"), f"{name}Output"):
        if candidate != name and hasattr(io_struct, candidate):
            return candidate
    return _ANSWERS.get(name)


_ANSWERS = {
    "KvHintsReqInput": "KvHintsReqOutput",
    "LoadLoRAAdapterReqInput": "LoRAUpdateOutput",
    "UnloadLoRAAdapterReqInput": "LoRAUpdateOutput",
    "LoadLoRAAdapterFromTensorsReqInput": "LoRAUpdateOutput",
}
#: Answers that the controller gives for a worker that is down.
ANSWERED_FOR = frozenset({"FlushCacheReqOutput", "GetInternalStateReqOutput"})


def answer_for(answer: str, role: str, worker: int) -> bytes:
    """What a worker that is down would answer; it holds no cache, so that flushing has worked."""
    if answer == "FlushCacheReqOutput":
        return encode(FlushCacheReqOutput(success=True))
    state = {"smg": {"worker": {"role": role, "index": worker, "up": False}}}
    return encode(GetInternalStateReqOutput(internal_state=state))


def changes_weights(message: Any) -> bool:
    """Whether workers started later would have other weights than those running."""
    name = type(message).__name__
    return name.startswith(("UpdateWeights", "UpdateWeightFrom", "BeginWeightUpdate", "LoadLoRA"))
