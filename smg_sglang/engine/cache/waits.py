"""Requests wait for a prefix that another one is computing, or storage is bringing: asked as
SGLang admits them.

A hook around `PrefillAdder.add_one_req` (`patches/sglang-0.5.23/0013`). Ranks decide alike, without
a word between them: tokens, batches and the length of hits are the same on all, and a wait is
counted in the scheduler's passes, not in time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from smg_sglang.engine.paths import whole_pages
from smg_sglang.engine.streams.scheduling import around_add_one_req as add_streamed
from smg_sglang.tree.waits import shared_tokens

if TYPE_CHECKING:
    from smg_sglang.engine.cache.radix_cache import SmgRadixCache
    from smg_sglang.tier.host_tier import HostTier

#: Requests that are passed over in one pass of the scheduler, since each is looked up first. Those
#: behind them come later, as if these had been admitted.
MOST_PASSED_OVER = 32
#: Counts them, on the prefill adder of a pass.
PASSED_OVER = "smg_passed_over"


def around_add_one_req(
    original: Callable[..., Any], adder: Any, req: Any, *args: Any, **kw: Any
) -> Any:
    """Pass over a request that waits; all others as streams or as SGLang does."""
    wait = getattr(adder.tree_cache, "wait_for_prefix", None)
    if wait is not None and (verdict := wait(adder, req)) is not None:
        return verdict
    return add_streamed(original, adder, req, *args, **kw)


def pass_over(adder: Any) -> Any:
    """SGLang's verdict on a request that waits: go on with the next one, or, where many wait, with
    none."""
    from sglang.srt.managers.schedule_policy import AddReqResult

    passed_over = getattr(adder, PASSED_OVER, 0) + 1
    setattr(adder, PASSED_OVER, passed_over)
    return AddReqResult.CONTINUE if passed_over < MOST_PASSED_OVER else AddReqResult.OTHER


class PrefixWaits:
    """What `SmgRadixCache` knows of waiting requests. Scheduler thread only."""

    def __init__(self, cache: SmgRadixCache, tier: HostTier) -> None:
        self._cache = cache
        self._tier = tier

    def verdict(self, adder: Any, req: Any) -> Any:
        """SGLang's verdict on a request that waits; None for one that does not."""
        # `init_next_round_input` may have given it a state slot, which only SGLang takes back.
        waits = self._tier.waits
        if not waits.most_steps or self._cache.supports_mamba() or not _has_prefixes(req):
            return None
        known = req.prefix_len + req.host_hit_length
        if not waits.passes_over(req.rid, known, self._coming(adder, req, known)):
            return None
        return pass_over(adder)

    def _coming(self, adder: Any, req: Any, known: int) -> int:
        """Tokens of its prefix that the request will find when what is computed now is there."""
        tokens = req.full_untruncated_fill_ids
        shared = [
            shared_tokens(tokens, other.full_untruncated_fill_ids, known)
            for other in _computing(adder)
            if other.extra_key == req.extra_key
            and other.cache_salt == req.cache_salt
            and _has_prefixes(other)
        ]
        page = self._cache.page_size
        return min(max([0, *shared]) // page * page, whole_pages(req, len(tokens), page))


def _computing(adder: Any) -> Iterator[Any]:
    """Requests of this batch, among them the one whose chunks go on, and those whose prompt the
    device is computing: their first token is to come."""
    yield from adder.can_run_list
    if adder.running_batch is not None:
        yield from (req for req in adder.running_batch.reqs if not req.output_ids)


def _has_prefixes(req: Any) -> bool:
    """Whether what it computes is found by its tokens."""
    return (
        not req.skip_radix_cache_insert
        and req.input_embeds is None
        and req.positional_embed_overrides is None
    )
