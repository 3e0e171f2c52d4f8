"""Hints about prefixes: with a request (SGLang's `kv_hints`), or without one (`POST /kv_hints`).

What to retain and what to demote is known when the request ends, with its answer; what to prefetch
when it comes. In host memory hints are the tier's business (`tier/hints.py`). Here they become page
keys; and what was demoted leaves the device first, when the device needs room.

With several ranks all do the same in the same step: hints, requests and batches are the same on
all, and where one alone knows (what storage has brought), they agree.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from smg_sglang.engine.paths import page_path
from smg_sglang.tier.hint_actions import DEMOTE, PREFETCH, RETAIN, Hint, HintRefused, read_envelope
from smg_sglang.tier.hints import PENDING, tenant_of
from smg_sglang.tree.page_keys import KEY_BYTES

if TYPE_CHECKING:
    from smg_sglang.engine.cache.radix_cache import SmgRadixCache
    from smg_sglang.tier.host_tier import HostTier

logger = logging.getLogger(__name__)

_K = TypeVar("_K")

#: Sessions whose last prefix is known, prefixes that were demoted, and those being prefetched.
MOST_SESSIONS, MOST_DEMOTED, MOST_COMING = 4096, 256, 64
#: Requests whose end is waited for.
MOST_OPEN = 1 << 16
#: Tokens of the first, and of the second, that are kept in mind (8 bytes each).
MOST_TOKENS = 1 << 23
#: Steps of the scheduler that a prefix is waited for: until storage has brought it, and until the
#: device has room for more of it, which it takes from requests that wait.
MOST_STEPS, MOST_IDLE_STEPS = 1000, 64


@dataclass
class Prompt:
    """Tokens that no request stands for, with all that is read of one to look for its prefix."""

    rid: str
    origin_input_ids: array[int]
    extra_key: str | None
    cache_salt: str | None
    output_ids: array[int]
    priority: int = 0
    positional_embed_overrides: None = None
    session: None = None

    def _compute_max_prefix_len(self, tokens: int) -> int:
        """As of SGLang's requests, but that it has no last token to be computed."""
        return tokens


@dataclass
class _Coming:
    """A prefix on its way up. brought: what storage has of it is in host memory. steps: since it
    came; idle: since nothing more of it is being loaded."""

    prompt: Prompt
    path: bytes
    brought: bool
    steps: int = 0
    idle: int = 0


class CacheHints:
    """Scheduler thread only; none raises."""

    def __init__(self, cache: SmgRadixCache, tier: HostTier) -> None:
        self._cache = cache
        self._tier = tier
        self._page = cache.page_size
        self._numbers = 0
        self._open: dict[str, list[Hint]] = {}
        """By request: what is to be done when it ends."""
        self._sessions: _Known[tuple[bytes, str]] = _Known(MOST_SESSIONS)
        self._demoted: _Known[bytes] = _Known(MOST_DEMOTED)
        self._coming: dict[str, _Coming] = {}

    # ---- where hints come from ----

    def arrived(self, req: Any) -> None:
        """A request is looked for in the cache, perhaps not for the first time."""
        envelope = getattr(req, "kv_hints", None)
        if envelope is not None and req.rid not in self._open:
            self._open[req.rid] = list(self._read(req, envelope))
            if len(self._open) > MOST_OPEN:
                self.dropped(next(iter(self._open)))

    def released(self, req: Any) -> None:
        """A request has given its slots back; where it has ended, they are in the tree."""
        if getattr(req, "kv_hints", None) is None or not req.finished():
            return
        self.arrived(req)
        tokens = req.origin_input_ids + req.output_ids
        prompt = self._prompt(req, tokens[: min(len(tokens), req.owned_kv_len())])
        for hint in self._open.pop(req.rid):
            self._act(hint, prompt)

    def dropped(self, rid: str) -> None:
        """A request has left before it ran."""
        for hint in self._open.pop(rid, ()):
            self._tier.hints.count(hint.kind, "absent")

    def told(self, message: Any) -> list[str]:
        """Hints without a request. -> what became of each: an outcome, or "pending".

        message: has `input_ids`, `extra_key`, `cache_salt` and `kv_hints`.
        """
        prompt = self._prompt(message, array("q", message.input_ids))
        return [
            self._refuse(hint) if isinstance(hint, HintRefused) else self._act(hint, prompt)
            for hint in _hints(message.kv_hints)
        ]

    def _read(self, req: Any, envelope: Any) -> Iterator[Hint]:
        """The hints that wait for the request's end; the others are seen to."""
        for hint in _hints(envelope):
            if isinstance(hint, HintRefused):
                self._refuse(hint)
            elif hint.kind == PREFETCH or hint.input_ids is not None:
                self._act(hint, self._prompt(req, req.origin_input_ids))
            else:
                yield hint

    def _refuse(self, refused: HintRefused) -> str:
        logger.debug("smg: a hint was ignored: %s", refused)
        return self._tier.hints.count(refused.kind, refused.outcome)

    def _prompt(self, of: Any, tokens: Sequence[int]) -> Prompt:
        self._numbers += 1
        ids = tokens if isinstance(tokens, array) else array("q", tokens)
        name = f"smg-hint-{self._numbers}"
        return Prompt(name, ids, of.extra_key, of.cache_salt, array("q"))

    # ---- what becomes of them ----

    def _act(self, hint: Hint, prompt: Prompt) -> str:
        if hint.input_ids is not None:
            prompt = self._prompt(prompt, hint.input_ids)
        if hint.kind == DEMOTE and hint.session is not None:
            known = self._sessions.pop((tenant_of(prompt.cache_salt), hint.session))
            if known is None:
                return self._tier.hints.count(DEMOTE, "absent")
            prompt = known
        whole = min(len(prompt.origin_input_ids), hint.tokens or 1 << 62) // self._page * self._page
        prompt = self._prompt(prompt, prompt.origin_input_ids[:whole])
        path, _ = page_path(prompt, prompt.origin_input_ids, self._page)
        if not path:
            return self._tier.hints.count(hint.kind, "absent")
        if hint.kind == RETAIN:
            return self._retain(hint, prompt, path)
        return self._demote(prompt, path) if hint.kind == DEMOTE else self._prefetch(prompt, path)

    def _retain(self, hint: Hint, prompt: Prompt, path: bytes) -> str:
        if self._tier.trails:
            # A hit needs the end of what layers with windows or states keep, too, which goes by
            # itself.
            return self._tier.hints.count(RETAIN, "unsupported")
        tenant = tenant_of(prompt.cache_salt)
        if hint.session is not None:
            self._sessions.put((tenant, hint.session), prompt)
        self._wanted_again(path)
        return self._tier.hints.retain(path, hint.seconds, tenant)

    def _demote(self, prompt: Prompt, path: bytes) -> str:
        if self._cache.tree_components == (ComponentType.FULL,):
            self._demoted.put(path, prompt)
        return self._tier.hints.demote(path)

    def _prefetch(self, prompt: Prompt, path: bytes) -> str:
        if len(self._coming) >= MOST_COMING:
            return self._tier.hints.count(PREFETCH, "unavailable")
        self._wanted_again(path)
        pages, have = len(path) // KEY_BYTES, self._in_host_memory(path)
        stored = self._tier.stored
        if stored is not None:
            stored.bring(prompt.rid, path, have)
        elif self._cache.prefetch is None:
            return self._ended(have, pages)
        self._coming[prompt.rid] = _Coming(prompt, path, brought=stored is None)
        return PENDING

    def _in_host_memory(self, path: bytes) -> int:
        """Pages of `path` that host memory has, which counts as a use."""
        lease = self._tier.lookups.lookup(path, 0)
        if lease is None:
            return 0
        self._tier.release(lease)
        return len(lease.pages)

    def _ended(self, found: int, wanted: int) -> str:
        outcome = "met" if found >= wanted else "partial" if found else "absent"
        return self._tier.hints.count(PREFETCH, outcome)

    # ---- prefixes on their way up ----

    def step(self) -> None:
        """Before requests are matched, in each step."""
        self._tier.hints.sweep()
        if not self._coming:
            return
        stored = self._tier.stored
        if stored is not None:
            brought = [stored.brought(rid) for rid in self._coming]
            for coming, on_all in zip(
                self._coming.values(), self._cache.least_of_ranks(*brought), strict=True
            ):
                coming.brought = bool(on_all)
        for coming in list(self._coming.values()):
            if self._has_ended(coming):
                self._end(coming)

    def _has_ended(self, coming: _Coming) -> bool:
        ahead = self._cache.prefetch
        coming.steps += 1
        if not coming.brought:
            return coming.steps > MOST_STEPS
        if ahead is None:
            return True
        coming.idle = 0 if ahead.is_loading(coming.prompt.rid) else coming.idle + 1
        return coming.idle > MOST_IDLE_STEPS or ahead.is_done(coming.prompt.rid)

    def _end(self, coming: _Coming) -> None:
        rid, path = coming.prompt.rid, coming.path
        del self._coming[rid]
        if self._tier.stored is not None:
            self._tier.stored.forget(rid)
        found = self._in_host_memory(path)
        if self._cache.prefetch is not None:
            found = self._match(coming.prompt).device_prefix_len // self._page
        self._ended(found, len(path) // KEY_BYTES)

    def prompts(self) -> list[Prompt]:
        """Those that are to be loaded to the device, as far as it has room."""
        return [coming.prompt for coming in self._coming.values() if coming.brought]

    # ---- what was demoted leaves the device first ----

    def matched(self, path: bytes) -> None:
        """A request asks for `path`."""
        self._wanted_again(path)

    def _wanted_again(self, path: bytes) -> None:
        for demoted in [known for known in self._demoted.prompts if path.startswith(known)]:
            self._demoted.pop(demoted)

    def evict_demoted(self, tokens: int, evict_leaf: Callable[[int], int]) -> int:
        """Evict up to so many tokens, and as many more as the last node has, of what was demoted
        and nobody shares or uses. -> how many

        evict_leaf: evicts a leaf of the tree; -> its tokens.
        """
        evicted = 0
        for path, prompt in list(self._demoted.prompts.items()):
            if evicted >= tokens:
                break
            match = self._match(prompt)
            if not match.device_prefix_len:
                self._demoted.pop(path)
            elif match.device_prefix_len == len(prompt.origin_input_ids):
                for node_id in self._alone(match.last_device_node):
                    evicted += evict_leaf(node_id)
                    if evicted >= tokens:
                        break
        return evicted

    def _match(self, prompt: Prompt) -> Any:
        key = RadixKey(prompt.origin_input_ids, prompt.extra_key, cache_salt=prompt.cache_salt)
        return self._cache.match_prefix(MatchPrefixParams(key=key))

    def _alone(self, node_id: int) -> list[int]:
        """The nodes from this leaf upwards that nobody has locked and no other path shares."""
        (nodes,) = self._cache.tree_core.collect_path_info([node_id])
        alone = []
        for node, children in zip(reversed(nodes), (0, *[1] * len(nodes)), strict=False):
            if node.num_children != children or not node.full_value_len:
                break
            if self._is_locked(node.node_id):
                break
            alone.append(node.node_id)
        return alone

    def _is_locked(self, node_id: int) -> bool:
        """A lock on a node locks all above it: where one more changes nothing, there is one."""
        free = self._cache.tree_evictable_size()
        lock = self._cache.lock(node_id)
        locked = self._cache.tree_evictable_size() == free
        self._cache.unlock(lock)
        return locked

    def clear(self) -> None:
        """The cache is empty, or the weights are others."""
        for coming in list(self._coming.values()):
            self._end(coming)
        self._demoted = _Known(MOST_DEMOTED)


class _Known(Generic[_K]):
    """Prompts by key, the newest of them: so many, and so many tokens."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._tokens = 0
        self.prompts: dict[_K, Prompt] = {}

    def put(self, key: _K, prompt: Prompt) -> None:
        self.pop(key)
        self.prompts[key] = prompt
        self._tokens += len(prompt.origin_input_ids)
        while len(self.prompts) > self._most or self._tokens > MOST_TOKENS:
            self.pop(next(iter(self.prompts)))

    def pop(self, key: _K) -> Prompt | None:
        prompt = self.prompts.pop(key, None)
        if prompt is not None:
            self._tokens -= len(prompt.origin_input_ids)
        return prompt


def _hints(envelope: Any) -> Iterator[Hint | HintRefused]:
    return read_envelope(envelope.protocol_version, envelope.actions)
