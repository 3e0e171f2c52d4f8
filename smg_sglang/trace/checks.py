"""What a trace must not contradict."""

from __future__ import annotations

from collections.abc import Sequence


def check_time(arrival_s: float, before_s: float) -> None:
    """ValueError where time goes backwards."""
    if arrival_s < before_s:
        raise ValueError(f"time goes backwards, from {before_s:g} s to {arrival_s:g} s")


def check_count(ids: int, input_tokens: int, block_tokens: int, *, partial: bool | None) -> None:
    """ValueError unless so many ids make that many tokens.

    `partial`: whether an incomplete last block has an id; None where both occur.
    """
    whole, rest = divmod(input_tokens, block_tokens)
    with_rest = whole + (rest > 0)
    allowed = {whole, with_rest} if partial is None else {with_rest if partial else whole}
    if ids not in allowed:
        raise ValueError(
            f"{input_tokens} input tokens in blocks of {block_tokens} make "
            f"{' or '.join(map(str, sorted(allowed)))} ids, not {ids}"
        )


class PrefixIds:
    """Holds a trace to its word that equal ids mean equal tokens and an equal prefix."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._seen: dict[int, tuple[int | None, int]] = {}

    def check(self, ids: Sequence[int], input_tokens: int) -> None:
        """ValueError where an id has followed another one before, or had another length."""
        before: int | None = None
        left = input_tokens
        for id_ in ids:
            tokens = min(self._block_tokens, left)
            known = self._seen.setdefault(id_, (before, tokens))
            if known[0] != before:
                raise ValueError(
                    f"id {id_} stands for another prefix than before: it follows "
                    f"{_name(before)} here, and followed {_name(known[0])}"
                )
            if known[1] != tokens:
                raise ValueError(f"id {id_} has {tokens} tokens here, and had {known[1]} before")
            before = id_
            left -= tokens


def _name(id_: int | None) -> str:
    return "nothing" if id_ is None else f"id {id_}"
