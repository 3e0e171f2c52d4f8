"""What is asked of a server, made from a seed before anything runs: all servers get the same."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.serving.infinite_cache import InfiniteCache

#: Token ids of words, clear of a tokenizer's special ones.
FIRST_TOKEN, LAST_TOKEN = 1_000, 40_000


@dataclass(frozen=True)
class Turn:
    """One request: a conversation's history, then `added`.

    Attributes:
        conversation: whose history; it is empty at the first turn.
        added: token ids that the user adds.
        answer_tokens: length of the answer, which joins the history.
    """

    conversation: int
    added: tuple[int, ...]
    answer_tokens: int


@dataclass(frozen=True)
class Workload:
    """Turns in the order in which they are sent, `concurrency` at a time."""

    name: str
    title: str
    turns: tuple[Turn, ...]
    concurrency: int

    def prompt_lengths(self) -> list[int]:
        """Tokens of each turn's prompt, in order."""
        history: dict[int, int] = defaultdict(int)
        lengths = []
        for turn in self.turns:
            lengths.append(history[turn.conversation] + len(turn.added))
            history[turn.conversation] = lengths[-1] + turn.answer_tokens
        return lengths

    def infinite_hits(self, page_size: int) -> list[int]:
        """Prompt tokens of each turn that a cache without an end would have, in whole pages."""
        cache = InfiniteCache(page_size)
        history: dict[int, tuple[int, ...]] = defaultdict(tuple)
        hits = []
        for number, turn in enumerate(self.turns):
            prompt = history[turn.conversation] + turn.added
            hits.append(cache.ask(prompt))
            # Whatever is answered, it is nobody else's: ids that no prompt has.
            answer = tuple(-1 - number for _ in range(turn.answer_tokens))
            cache.answered(prompt, answer)
            history[turn.conversation] = prompt + answer
        return hits


def words(rng: random.Random, count: int) -> tuple[int, ...]:
    """`count` random token ids."""
    return tuple(rng.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(count))


def chats(
    *,
    working_set: int,
    chat_tokens: int = 864,
    first_tokens: int = 504,
    added_tokens: int = 24,
    answer_tokens: int = 24,
    concurrency: int = 4,
    seed: int = 1,
) -> Workload:
    """Chats that take turns until together they are `working_set` tokens long.

    In each round every chat has its turn, in an order of its own. By default four of them fit the
    pool of a quarter of the working set at once, so that no server waits for room.
    """
    rng = random.Random(seed)
    count = max(1, round(working_set / chat_tokens))
    rounds = 1 + (chat_tokens - first_tokens - answer_tokens) // (added_tokens + answer_tokens)
    turns = []
    for round_ in range(rounds):
        length = added_tokens if round_ else first_tokens
        for chat in rng.sample(range(count), count):
            turns.append(Turn(chat, words(rng, length), answer_tokens))
    title = f"{count} chats of {rounds} turns, working set {working_set:,} tokens"
    return Workload("chats", title, tuple(turns), concurrency)


def documents(
    *,
    working_set: int,
    document_tokens: int = 2000,
    questions: int = 6,
    question_tokens: int = 32,
    answer_tokens: int = 16,
    concurrency: int = 1,
    seed: int = 2,
) -> Workload:
    """Long documents, each asked several questions, in shuffled order."""
    rng = random.Random(seed)
    texts = [words(rng, document_tokens) for _ in range(max(1, working_set // document_tokens))]
    order = [text for text in texts for _ in range(questions)]
    rng.shuffle(order)
    turns = tuple(
        Turn(number, text + words(rng, question_tokens), answer_tokens)
        for number, text in enumerate(order)
    )
    title = f"{len(texts)} documents of {document_tokens:,} tokens, {questions} questions each"
    return Workload("documents", title, turns, concurrency)


def no_reuse(
    *,
    requests: int = 4,
    prompt_tokens: int = 256,
    answer_tokens: int = 32,
    concurrency: int = 4,
    seed: int = 3,
) -> Workload:
    """Prompts that share nothing."""
    rng = random.Random(seed)
    turns = tuple(
        Turn(number, words(rng, prompt_tokens), answer_tokens) for number in range(requests)
    )
    title = f"{requests} prompts of {prompt_tokens} tokens that share nothing"
    return Workload("no_reuse", title, turns, concurrency)


@dataclass(frozen=True)
class PrefixStep:
    """One ask of the headline: which prefix, and where it should be by now."""

    prefix: int
    expected: str  # "cold", "device" or "host"


def prefix_steps(count: int, pool_tokens: int, prefix_tokens: int) -> Iterator[PrefixStep]:
    """Ask each prefix cold and again at once; once the pool has been overrun, ask it again.

    Interleaved, so that what else happens on the box meets all three alike.
    """
    behind = -(-pool_tokens // prefix_tokens)
    for number in range(count + behind):
        if number < count:
            yield PrefixStep(number, "cold")
            yield PrefixStep(number, "device")
        else:
            yield PrefixStep(number, "filler")
        if number - behind >= 0:
            yield PrefixStep(number - behind, "host")


def overrun(steps: Sequence[PrefixStep], number: int) -> int:
    """Other prefixes asked between a prefix's device hit and its host hit."""
    places = [i for i, step in enumerate(steps) if step.prefix == number]
    between = {step.prefix for step in steps[places[1] + 1 : places[2]]}
    return len(between)
