"""Page keys: 128-bit names of KV pages that say what all the tokens up to the page's end were.

A key chains its parent's key, so equal keys mean equal prefixes, whoever computed them. Keys
cross tenants, hence a cryptographic hash: with a fast one a client could forge another's page.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

KEY_BYTES = 16

_HEX_DIGITS = 2 * KEY_BYTES
_SEED_PERSON = b"smg page chain"


def page_keys(
    tokens: Sequence[int] | NDArray[np.integer],
    page_size: int,
    *,
    parent: bytes = b"",
    extra_key: str | None = None,
    cache_salt: str | None = None,
) -> bytes:
    """The path (n keys of 16 bytes, joined) of the whole pages in `tokens`.

    A key is blake2b-128 over its parent's key and the page's token ids as int64 LE; the first
    page's parent is a seed made of `page_size`, `extra_key` (LoRA) and `cache_salt` (tenant).
    Tokens after the last whole page are left out. `array('q')` and int64 arrays are not copied
    on the way in; lists cost more than the hashing does.

    To go on after n known pages, pass the tokens behind them and `parent`, the last known key:
    the result is what the whole call would have given from there, and the namespace is already
    in the chain.

    Raises ValueError for a page size below 1, token ids that are no integers of 64 bits, or a
    parent that is not one key. Any thread.
    """
    if page_size < 1:
        raise ValueError(f"page size must be at least 1 token, got {page_size}")
    if parent and len(parent) != KEY_BYTES:
        raise ValueError(f"a parent key has {KEY_BYTES} bytes, got {len(parent)}")
    key = parent or _seed(page_size, extra_key, cache_salt)
    path: list[bytes] = []
    for page in _page_bytes(tokens, page_size):
        key = blake2b(key + page, digest_size=KEY_BYTES).digest()
        path.append(key)
    return b"".join(path)


def keys_from_hex(hashes: Sequence[str]) -> bytes:
    """The path of SGLang's own page hashes: hex sha256 digests, chained by SGLang in the same
    way (`mem_cache.utils.get_storage_hash_str`), cut to their first 128 bits.

    Raises ValueError for a hash that is too short or not hex. Any thread.
    """
    path = bytes.fromhex("".join([digest[:_HEX_DIGITS] for digest in hashes]))
    if len(path) != KEY_BYTES * len(hashes):
        short = next(digest for digest in hashes if len(digest) < _HEX_DIGITS)
        raise ValueError(f"a page hash needs at least {_HEX_DIGITS} hex digits, got {short!r}")
    return path


def _page_bytes(tokens: Sequence[int] | NDArray[np.integer], page_size: int) -> list[bytes]:
    """Each whole page's token ids as bytes; numpy cuts them, which saves a slice per page."""
    ids = np.asarray(tokens)
    if ids.ndim != 1 or (ids.size and not np.can_cast(ids.dtype, np.int64)):
        raise ValueError(f"token ids must be one row of integers, got {ids.dtype}{ids.shape}")
    whole = len(ids) // page_size * page_size
    little = np.ascontiguousarray(ids[:whole], dtype="<i8")
    pages: list[bytes] = little.view(f"V{8 * page_size}").tolist()
    return pages


def _seed(page_size: int, extra_key: str | None, cache_salt: str | None) -> bytes:
    """Presence and length go in too, so that ("ab", None), ("a", "b") and ("", "ab") differ."""
    seed = blake2b(digest_size=KEY_BYTES, person=_SEED_PERSON)
    seed.update(page_size.to_bytes(8, "little"))
    for part in (extra_key, cache_salt):
        text = b"" if part is None else part.encode()
        seed.update((part is not None).to_bytes(1, "little") + len(text).to_bytes(8, "little"))
        seed.update(text)
    return seed.digest()
