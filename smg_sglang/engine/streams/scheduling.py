"""How SGLang's scheduler admits streamed requests: the places where it asks a prefill adder, a
batch or itself what fits, which know nothing of a context larger than the device.

All are hooks around SGLang's functions (`patches/sglang-0.5.23/0009` and `0010`), and do nothing
for requests that are not streams.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from smg_sglang.engine.options import record
from smg_sglang.engine.streams.limits import Limits, new_tokens
from smg_sglang.engine.streams.stream import Stream
from smg_sglang.engine.streams.table import STREAMED, Streams

Original = Callable[..., Any]

#: Set on a prefill adder once a stream waits for host memory in its pass.
HOST_WAITS = "smg_host_waits"


def streams_of(cache: Any) -> Streams | None:
    """The streams of a worker's cache; None where contexts are not streamed."""
    found: Streams | None = getattr(cache, "streams", None)
    return found


def after_get_worker_info(result: Any, worker: Any) -> Any:
    """What a prompt may have is not bound by the device pool: (.., max_req_len,
    max_req_input_len, ..), as SGLang tells its other processes."""
    if not record.chosen(worker.server_args).stream_context:
        return result
    longest = worker.model_config.context_len - 1
    info = list(result)
    info[4], info[5] = longest, longest - 5
    return tuple(info)


def around_init_max_new_tokens(original: Original, scheduler: Any, req: Any) -> None:
    """Clip what a stream may generate to host memory, and refuse what cannot run anywhere."""
    streams, sampling = streams_of(scheduler.tree_cache), req.sampling_params
    asked, least = sampling.max_new_tokens, sampling.min_new_tokens
    original(scheduler, req)
    longest = scheduler.max_req_len - len(req.origin_input_ids) - 1
    if streams is None or longest < 1:
        return
    caps = [1 << 30 if asked is None else asked, longest]
    if (cap := scheduler.max_new_tokens_limit) is not None and cap > 0:
        caps.append(cap)
    new = max_new_tokens(streams, req, max(0, min(caps)), sampling.max_new_tokens)
    sampling.max_new_tokens, sampling.min_new_tokens = new, min(least, new)


def max_new_tokens(streams: Streams, req: Any, new: int, on_device: int) -> int:
    """What a request may generate of the `new` tokens it asks for, where the device alone has room
    for `on_device`; one that cannot run anywhere is marked as aborted, with the numbers."""
    limits, prompt = streams.limits, len(req.origin_input_ids)
    if not limits.needs_stream(prompt, new):
        return on_device
    host = streams.host_tokens()
    if (reason := why_not(req, limits, host)) is not None:
        req.set_finish_with_abort(reason)
        return on_device
    setattr(req, STREAMED, True)
    return min(new, limits.most_new(prompt, host))


def why_not(req: Any, limits: Limits, host: int) -> str | None:
    """Why a request that is too large for the device cannot be streamed, with the numbers."""
    length = len(req.origin_input_ids)
    if limits.most_new(length, host) < 1:
        if not host:
            return (
                f"The prompt has {length} tokens, the device holds {limits.device}, and no memory "
                "server has been reached yet."
            )
        return (
            f"The prompt has {length} tokens; host memory holds {host} "
            f"(--smg-host-gb), the device {limits.device}."
        )
    unfit = [
        (req.session is not None, "a session"),
        (req.beam_group is not None, "beam search"),
        (req.multimodal_inputs is not None, "images or other media"),
        (req.input_embeds is not None, "input embeddings"),
        (req.positional_embed_overrides is not None, "embedding overrides"),
        (req.skip_radix_cache_insert, "KV that may not be cached"),
    ]
    for found, what in unfit:
        if found:
            return (
                f"The prompt has {length} tokens, the device holds {limits.device}; a request with "
                f"{what} cannot be streamed from host memory."
            )
    return None


def around_add_one_req(original: Original, adder: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """Admit a stream for a chunk of its prompt."""
    streams, full = streams_of(adder.tree_cache), adder.prefill_max_requests
    if streams is None or (full is not None and len(adder.can_run_list) >= full):
        return original(adder, req, *args, **kwargs)
    has_chunked_req = kwargs.get("has_chunked_req", args[0] if args else False)
    verdict = admit(streams, adder, req, has_chunked_req)
    return original(adder, req, *args, **kwargs) if verdict is None else verdict


def admit(streams: Streams, adder: Any, req: Any, has_chunked_req: bool) -> Any:
    """SGLang's verdict on a request that runs as a stream; None for one that does not."""
    from sglang.srt.managers.schedule_policy import AddReqResult

    if not streams.needs(req) or adder.rem_chunk_tokens is None:
        _make_room(streams, adder, req)
        return None
    if has_chunked_req or adder.new_chunked_req is not None:
        # SGLang computes one prompt in chunks at a time.
        return AddReqResult.OTHER
    if _waits_for_host(streams, adder, req):
        return adder.budget_state()
    chunk = min(_room(streams, adder), adder.rem_chunk_tokens)
    if chunk < 1:
        return AddReqResult.NO_TOKEN
    stream = streams.open(req)
    _take_prefix(streams, adder.tree_cache, stream)
    _commit(streams, adder, req, chunk)
    return adder.budget_state()


def _make_room(streams: Streams, adder: Any, req: Any) -> None:
    """What streams keep on the device beside host memory goes where an ordinary request would have
    to wait for it."""
    if not streams.keep_resident:
        return
    known = len(req.full_untruncated_fill_ids or req.origin_input_ids)
    wanted = streams.limits.paged(known - req.prefix_len + new_tokens(req)) + streams.page
    if wanted > min(adder.rem_total_tokens, adder.cur_rem_tokens):
        streams.leave_device()


def _waits_for_host(streams: Streams, adder: Any, req: Any) -> bool:
    """Whether other streams have the host memory that it needs: it keeps its place, and ordinary
    requests go on. Later streams do not overtake it. Alone it runs, whatever there is."""
    waits = getattr(adder, HOST_WAITS, False) or (
        len(streams) > 0 and streams.host_need(req) > streams.host_room()
    )
    setattr(adder, HOST_WAITS, waits)
    return waits


def _room(streams: Streams, adder: Any) -> int:
    """Tokens of the device that a stream's chunk may take now, in whole pages."""
    limits = streams.limits
    room = _free_room(limits, adder)
    if room < limits.page and streams.keep_resident:
        streams.leave_device()
        room = _free_room(limits, adder)
    return room


def _free_room(limits: Limits, adder: Any) -> int:
    free = int(min(adder.rem_total_tokens, adder.cur_rem_tokens)) - limits.page - limits.tail
    return min(limits.chunk, free // limits.page * limits.page)


def _take_prefix(streams: Streams, cache: Any, stream: Stream) -> None:
    """What host memory has is the request's prefix: nothing is loaded, nothing is locked."""
    req, tokens = stream.req, stream.resident_from
    cache.linker.release_finished(req.rid)
    root = cache.root_node_handle(req.extra_key)
    req.last_node = req.best_match_node = req.last_host_node = root
    req.prefix_len = req.host_hit_length = req.host_loaded_length = tokens
    req.num_matched_prefix_tokens = tokens
    req.kv.cache_protected_len = tokens
    cache.host_tier.counters.hit_tokens["host"] += tokens


def _commit(streams: Streams, adder: Any, req: Any, chunk: int) -> None:
    from sglang.srt.managers.schedule_policy import _PrefillAdmission

    left = len(req.full_untruncated_fill_ids) - req.prefix_len
    is_chunked = left > chunk
    # What it generates leaves the device again: it never has more than a tail there.
    new = 0 if is_chunked else min(new_tokens(req), streams.limits.tail)
    admission = _PrefillAdmission(req.prefix_len, min(left, chunk), new, is_chunked, 0)
    adder._commit_prefill_admission(req, admission, 0)
    if is_chunked:
        # The chunk may be shorter than SGLang's: no other prompt may begin chunks beside it.
        adder.rem_chunk_tokens = 0


def around_add_chunked_req(original: Original, adder: Any, req: Any) -> Any:
    """The next chunk of a stream: as large as there is room, or none in this step."""
    streams = streams_of(adder.tree_cache)
    limit = chunk_limit(streams, adder, req) if streams is not None else None
    if limit is None:
        return original(adder, req)
    rest = req
    if limit > 0:
        adder.chunked_req_limit = min(adder.chunked_req_limit or limit, limit)
        rest = original(adder, req)
    if rest is not None:
        # A chunk below the budget: no other prompt may begin chunks beside it.
        adder.rem_chunk_tokens = 0
    return rest


def chunk_limit(streams: Streams, adder: Any, req: Any) -> int | None:
    """Tokens that the next chunk of a stream may have, 0 to wait for room; None without one."""
    stream = streams.get(req)
    if stream is None:
        return None
    if stream.failure is not None:
        streams.checkpoint(stream, req.prefix_len)
    room = _room(streams, adder)
    if room < streams.page and stream.failure is not None:
        # It holds the room that it waits for. A last page, after which SGLang drops it.
        return streams.page
    return room if room >= streams.page else 0


def around_running_offset(original: Original, adder: Any, req: Any) -> Any:
    """What a running request may still take of the device: a stream a tail at most."""
    streams, tokens = streams_of(adder.tree_cache), original(adder, req)
    return tokens if streams is None else device_tokens(streams, req, tokens)


def device_tokens(streams: Streams, req: Any, tokens: float) -> float:
    """How many of the `tokens` to come of a running request may be on the device at once."""
    return tokens if streams.get(req) is None else min(tokens, streams.limits.tail)


def before_check_decode_mem(batch: Any, *args: Any, **kwargs: Any) -> None:
    """Before the next tokens of a batch get slots."""
    streams = streams_of(batch.tree_cache)
    if streams is not None and len(streams):
        make_decode_room(streams, batch)


def make_decode_room(streams: Streams, batch: Any) -> None:
    """Streams move what they gathered to host memory, and all that they have where slots are
    short."""
    allocator, limits = batch.token_to_kv_pool_allocator, streams.limits
    free = allocator.available_size() + batch.tree_cache.evictable_size()
    short = free < limits.page * len(batch.reqs)
    for req in batch.reqs:
        stream = streams.get(req)
        if stream is None or req.finished() or req.to_finish is not None:
            continue
        streams.leave_tail(stream, limits.page if short else limits.tail)
        if stream.failure is not None:
            req.to_finish = failed(stream)


def failed(stream: Stream) -> Any:
    """The end of a request for which neither host memory nor the device has room."""
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    return FINISH_ABORT(stream.failure, HTTPStatus.SERVICE_UNAVAILABLE)
