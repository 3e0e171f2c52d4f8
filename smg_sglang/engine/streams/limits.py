"""How much of the device and of host memory streamed requests may have, in tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: Tokens of a staging buffer. Large enough that merging partial states costs little beside
#: attending (measured on a CPU: `docs/contexts.md`; on CUDA an estimate: 32 MiB of a layer of
#: Llama-3.1-8B, 0.6 ms at 50 GB/s, beside which launches are short).
SEGMENT_TOKENS = {"cpu": 2048, "cuda": 8192}
#: The newest tokens of a stream that gather on the device while it generates, at most.
TAIL_TOKENS = 512


@dataclass(frozen=True)
class Limits:
    """All in tokens.

    Attributes:
        device: the device pool.
        page: tokens a page.
        on_cuda: whether what is read from host memory crosses a link.
    """

    device: int
    page: int
    on_cuda: bool = False

    @property
    def chunk(self) -> int:
        """The most that a stream computes at once: others keep half of the device."""
        return max(self.page, self.device // 2 // self.page * self.page)

    @property
    def tail(self) -> int:
        """The most that a generating stream keeps on the device."""
        return max(self.page, min(TAIL_TOKENS, self.device // 16) // self.page * self.page)

    @property
    def resident(self) -> int:
        """The most that all streams together keep on the device of what host memory has, too.

        Where every pass reads host memory over a link, the newest pages are worth a quarter of the
        pool; a CPU reads either at the same speed.
        """
        return self.device // 4 // self.page * self.page if self.on_cuda else 0

    def paged(self, tokens: int) -> int:
        return -(-tokens // self.page) * self.page

    def most_new(self, prompt: int, host: int) -> int:
        """What a stream with so long a prompt may generate, where host memory has room for `host`
        tokens; below 1 where there is none for that."""
        return host - self.paged(prompt) - self.page

    def needs_stream(self, tokens: int, new: int) -> bool:
        """Whether a request of so many known tokens and `new` to come is too large for the device.

        Answers are seldom as long as they may be, so only an eighth of the pool counts for them;
        SGLang clips what a request may generate to what is left.
        """
        return self.paged(tokens) + min(new, self.device // 8) + self.page + 1 > self.device


def new_tokens(req: Any) -> int:
    """Tokens that the request may still generate."""
    return max((req.sampling_params.max_new_tokens or 0) - len(req.output_ids), 0)
