"""From a request of a trace to page keys, as a server would make them from its tokens."""

from __future__ import annotations

from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from smg_sglang.trace.request import Request
from smg_sglang.tree.page_keys import KEY_BYTES, page_keys

#: Marks keys of pages that hold tokens only this prompt has; ids of blocks are not negative.
_OWN = np.int64(-1 << 63)


class RequestPath(NamedTuple):
    """The pages of a request, and how many of them which part of it covers."""

    keys: bytes
    """Page keys of prompt and answer, without the last token, whose KV is never computed."""
    matchable: int
    """Leading pages that a cache may serve: the prompt's last token is always computed."""
    prompt: int
    """Leading pages that lie in the prompt as a whole."""

    def head(self, pages: int) -> bytes:
        """The keys of the first pages."""
        return self.keys[: pages * KEY_BYTES]

    def __len__(self) -> int:
        return len(self.keys) // KEY_BYTES


def request_path(request: Request, page_size: int) -> RequestPath:
    """The path of a request's tokens, in pages of `page_size` tokens.

    Where blocks are whole pages, a key is (block id, page within the block): the tree needs no
    digests, only keys that are equal where the tokens are. Otherwise tokens are made up from the
    ids and hashed. What nobody else has (an answer, or tokens without an id) gets keys of its own,
    the same ones for the same prompt: an answer at temperature 0 is the same.
    """
    whole = request.known_tokens // page_size
    if request.block_tokens % page_size == 0:
        known = _block_keys(request, whole, page_size)
    else:
        known = page_keys(_made_up_tokens(request), page_size)
    total = (request.input_tokens + max(request.output_tokens, 1) - 1) // page_size
    keys = known + _own_keys(request, known, total - whole)
    return RequestPath(
        keys, (request.input_tokens - 1) // page_size, request.input_tokens // page_size
    )


def _block_keys(request: Request, pages: int, page_size: int) -> bytes:
    per_block = request.block_tokens // page_size
    keys = np.empty((pages, 2), np.int64)
    keys[:, 0] = np.repeat(request.blocks, per_block)[:pages]
    keys[:, 1] = np.arange(pages) % per_block
    return keys.tobytes()


def _made_up_tokens(request: Request) -> NDArray[np.int64]:
    if request.block_tokens == 1:
        return request.blocks
    ids = request.blocks[:, None] * request.block_tokens
    return (ids + np.arange(request.block_tokens)).ravel()[: request.known_tokens]


def _own_keys(request: Request, known: bytes, pages: int) -> bytes:
    if pages <= 0:
        return b""
    # What the prompt is: all that is known of it, the id and length of a last page in part, and
    # the number of the request where it has tokens that no id names.
    nameless = request.input_tokens - request.known_tokens
    last = request.blocks[-1:].tobytes()
    whose = (request.known_tokens, nameless, request.number if nameless else -1)
    seed = blake2b(known + last + repr(whose).encode(), digest_size=8).digest()
    keys = np.empty((pages, 2), np.int64)
    keys[:, 0] = np.frombuffer(seed, np.int64) | _OWN
    keys[:, 1] = np.arange(pages)
    return keys.tobytes()
