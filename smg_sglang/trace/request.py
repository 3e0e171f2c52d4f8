"""One request of a trace."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

BlockIds = NDArray[np.int64]


@dataclass(frozen=True, eq=False, slots=True)
class Request:
    """What a trace says of one request. Immutable.

    Two requests have the same first n tokens exactly when their first ids that cover n tokens are
    the same; an id on its own stands for the tokens of its block only (in Mooncake and agent
    traces it stands for all before it, too).
    """

    number: int
    """Its place in the trace, from 0."""
    arrival_s: float
    """Seconds since the trace began; never falls within a trace."""
    blocks: BlockIds
    """int64[n], read-only: ids of the prompt's blocks, unique in the whole trace; of a token trace
    the token ids themselves."""
    block_tokens: int
    """Tokens an id stands for."""
    input_tokens: int
    output_tokens: int
    session: str | None = None
    """The chat or agent it belongs to, where the trace tells."""

    @property
    def known_tokens(self) -> int:
        """Leading prompt tokens that the ids cover, the last block perhaps in part. What follows
        is nobody else's."""
        return min(self.input_tokens, len(self.blocks) * self.block_tokens)

    def scaled(self, block_tokens: int) -> Request:
        """The same request with each block mapped to `block_tokens` tokens; prompt and output
        shrink (or grow) alike, rounded up. So a trace of long contexts fits a small model, and
        what was shared still is.

        ValueError where blocks are single tokens, which cannot be divided, or for less than one.
        """
        if self.block_tokens == 1:
            raise ValueError("a trace of tokens cannot be scaled, only one of blocks")
        if block_tokens < 1:
            raise ValueError(f"a block needs at least 1 token, not {block_tokens}")
        return replace(
            self,
            block_tokens=block_tokens,
            input_tokens=-(-self.input_tokens * block_tokens // self.block_tokens),
            output_tokens=-(-self.output_tokens * block_tokens // self.block_tokens),
        )


def block_ids(ids: list[int], offset: int = 0) -> BlockIds:
    """A read-only int64 array of `ids`, each plus `offset`."""
    blocks = np.array(ids, np.int64)
    blocks += offset
    blocks.setflags(write=False)
    return blocks
