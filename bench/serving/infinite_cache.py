"""A prefix cache that never forgets: what any cache is measured against."""

from __future__ import annotations

from collections.abc import Sequence


class InfiniteCache:
    """Whole pages of every prompt and answer so far, by what stands before them."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        #: (number of the page before, its own tokens) -> number of the page; 0 is the root.
        self._pages: dict[tuple[int, tuple[int, ...]], int] = {}

    def ask(self, prompt: Sequence[int]) -> int:
        """Tokens of the prompt that are there, in whole pages; remembers the prompt.

        The last token is computed in any case: its logits are wanted.
        """
        known = self._walk(prompt, len(prompt) - 1)
        self._remember(prompt)
        return known

    def answered(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Remember an answer. Its last token was never an input, so it has no KV."""
        self._remember([*prompt, *answer[:-1]])

    def _walk(self, tokens: Sequence[int], limit: int) -> int:
        page, known = 0, 0
        while known + self._page_size <= limit:
            key = (page, tuple(tokens[known : known + self._page_size]))
            if key not in self._pages:
                break
            page = self._pages[key]
            known += self._page_size
        return known

    def _remember(self, tokens: Sequence[int]) -> None:
        page = 0
        for start in range(0, len(tokens) - self._page_size + 1, self._page_size):
            key = (page, tuple(tokens[start : start + self._page_size]))
            page = self._pages.setdefault(key, len(self._pages) + 1)
