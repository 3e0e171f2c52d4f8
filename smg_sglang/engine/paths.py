"""A request's page keys, as SGLang hashes its tokens."""

from __future__ import annotations

from array import array
from typing import Any

from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str

from smg_sglang.tree.page_keys import keys_from_hex


def whole_pages(req: Any, tokens: int, page: int) -> int:
    """How many of the first `tokens` tokens of a request may be found in a cache: whole pages, and
    not the last token, nor those whose logprobs are wanted."""
    found: int = max(0, req._compute_max_prefix_len(tokens)) // page * page
    return found


def page_path(
    req: Any, tokens: array[int], page: int, parent: str | None = None
) -> tuple[bytes, list[str]]:
    """Page keys of `tokens` [n * page] of a request, and SGLang's hashes that they are made of.

    Args:
        req: has `extra_key` (LoRA) and `cache_salt` (tenant).
        parent: the hash of the page before them; None at the root.
    """
    if not tokens:
        return b"", []
    key = RadixKey(tokens, req.extra_key, cache_salt=req.cache_salt)
    hexes = get_storage_hash_str(key, parent, page_size=page)
    return keys_from_hex(hexes), hexes
