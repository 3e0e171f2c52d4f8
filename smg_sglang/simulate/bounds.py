"""What any cache could reach on a trace, and what simple ones do: one level, one request at a time.

Units are pages, or blocks where the paths are made of block ids.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smg_sglang.config import EvictionName
from smg_sglang.simulate.paths import request_path
from smg_sglang.trace.request import Request
from smg_sglang.tree.eviction import make_policy
from smg_sglang.tree.page_keys import KEY_BYTES
from smg_sglang.tree.radix_tree import RadixTree

_NEVER = 1 << 62


def page_runs(requests: Sequence[Request], page_size: int) -> Runs:
    """The prompts' whole pages; the last token of a prompt is always computed, and so is the page
    that it completes."""
    paths = [request_path(request, page_size) for request in requests]
    prompts = [path.head(path.prompt) for path in paths]
    return make_runs(prompts, [path.matchable for path in paths])


def block_paths(requests: Sequence[Request]) -> list[bytes]:
    """The blocks of each prompt as its trace names them, a partial last one included."""
    paths = []
    for request in requests:
        keys = np.zeros((len(request.blocks), 2), np.int64)
        keys[:, 0] = request.blocks
        paths.append(keys.tobytes())
    return paths


def units(paths: Sequence[bytes]) -> int:
    """Pages or blocks in all, counted at each occurrence."""
    return sum(len(path) for path in paths) // KEY_BYTES


def level_hits(
    paths: Sequence[bytes], capacity: int, eviction: EvictionName, unit_tokens: int
) -> int:
    """Hits of our tree as a single level of `capacity` units, evicting leaf first."""
    tree = RadixTree(make_policy(eviction, unit_tokens))
    hits = issued = 0
    for path in paths:
        match = tree.match(path)
        hits += match.length
        if match.length:
            tree.touch(match)
        new = len(path) // KEY_BYTES - match.length
        tree.insert(path, np.arange(issued, issued + new), match.length)
        issued += new
        tree.evict(tree.num_pages - capacity)
    return hits


def flat_lru_hits(paths: Sequence[bytes], capacity: int) -> int:
    """Hits of a plain LRU list of single units, as in published analyses of traces whose ids name
    prefixes: a hit ends at the first unit that is not there, and a prompt's first unit is older
    than its last, so beginnings go before what needs them."""
    known: OrderedDict[bytes, None] = OrderedDict()
    hits = 0
    for path in paths:
        keys = [path[at : at + KEY_BYTES] for at in range(0, len(path), KEY_BYTES)]
        hits += next((i for i, key in enumerate(keys) if key not in known), len(keys))
        for key in keys:
            known[key] = None
            known.move_to_end(key)
        while len(known) > capacity:
            known.popitem(last=False)
    return hits


@dataclass(frozen=True)
class Runs:
    """The paths as runs of units that always occur together: exact, and far fewer than units."""

    lengths: list[int]
    paths: list[list[int]]
    """Run numbers from the root, one list a request."""
    served: list[int]
    """How many runs of each path a cache may serve."""
    next_use: list[list[int]]
    """For each run of each path the next request it may be served to, before which nobody computes
    it; `_NEVER` if there is none."""


def make_runs(paths: Sequence[bytes], served: Sequence[int] | None = None) -> Runs:
    """The runs of some paths, of which a cache may serve the first `served` units each: all, if
    None."""
    if served is None:
        served = [len(path) // KEY_BYTES for path in paths]
    tree = _tree_of_all(paths, served)
    numbers = {node: number for number, node in enumerate(tree.nodes())}

    def along(path: bytes) -> list[int]:
        # A path ends at a node's end in a tree that has seen it.
        return [numbers[node] for node in reversed(list(tree.match(path).node.ancestry()))]

    runs = [along(path) for path in paths]
    heads = zip(paths, served, strict=True)
    counts = [len(along(path[: KEY_BYTES * units])) for path, units in heads]
    return Runs([node.length for node in numbers], runs, counts, _next_uses(runs, counts))


def _tree_of_all(paths: Sequence[bytes], served: Sequence[int]) -> RadixTree:
    tree = RadixTree()
    issued = 0
    for path, units_served in zip(paths, served, strict=True):
        known = tree.match(path).length
        new = len(path) // KEY_BYTES - known
        tree.insert(path, np.arange(issued, issued + new), known)
        issued += new
        if units_served:
            tree.touch(tree.match(path[: KEY_BYTES * units_served]))
    return tree


def _next_uses(runs: list[list[int]], served: list[int]) -> list[list[int]]:
    upcoming: dict[int, int] = {}
    next_use: list[list[int]] = []
    for time in reversed(range(len(runs))):
        path = runs[time]
        next_use.append([upcoming.get(run, _NEVER) for run in path])
        upcoming.update(dict.fromkeys(path[: served[time]], time))
        upcoming.update(dict.fromkeys(path[served[time] :], _NEVER))
    return next_use[::-1]


def infinite_hits(runs: Runs) -> int:
    """Hits of a cache that forgets nothing: no cache can have more."""
    seen: set[int] = set()
    hits = 0
    for path, served in zip(runs.paths, runs.served, strict=True):
        hits += sum(runs.lengths[run] for run in path[:served] if run in seen)
        seen.update(path)
    return hits


def belady_hits(runs: Runs, capacity: int) -> int:
    """No fewer hits than any cache of `capacity` units can have, knowing the future; and where all
    of a prompt may be served, no more than the best of them has.

    It drops what is needed again last (Belady, 1966), and keeps nothing that is not needed again.
    A prefix is needed no later than what follows it, so with ties broken from the end it never
    keeps a unit without its parents: what is optimal for single units is so for prefixes, too.
    (Keeping a unit from one use to the next is an interval; at most `capacity` may overlap; to
    drop the one that ends last is optimal for as many as possible.) Where a prompt's last units are
    computed though they are there, a prefix may have no use of its own for a while in which what
    follows it has one; a real cache has to keep it, and this one does not. The bound is for one
    level that sees one request at a time: two levels that hold the same pages twice have less room
    than the sum of their sizes, and requests that run together may miss each other's pages.
    """
    kept = [0] * len(runs.lengths)
    wanted_at = [_NEVER] * len(runs.lengths)
    order: list[tuple[int, int, int]] = []  # (-next use, -depth, run)
    total = hits = 0
    for path, served, uses in zip(runs.paths, runs.served, runs.next_use, strict=True):
        for depth, (run, use) in enumerate(zip(path, uses, strict=True)):
            hits += kept[run] if depth < served else 0
            keep = runs.lengths[run] if use < _NEVER else 0
            total += keep - kept[run]
            kept[run], wanted_at[run] = keep, use
            if keep:
                heapq.heappush(order, (-use, -depth, run))
        while total > capacity:
            use, _, run = order[0]
            if not kept[run] or wanted_at[run] != -use:
                heapq.heappop(order)
                continue
            given = min(kept[run], total - capacity)
            kept[run] -= given
            total -= given
    return hits
