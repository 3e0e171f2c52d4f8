"""What must hold of a tree at any time between two calls: checked by walking all of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from smg_sglang.tree.eviction import EvictionQueue
from smg_sglang.tree.node import Node
from smg_sglang.tree.page_keys import KEY_BYTES


def check_tree(
    root: Node,
    nodes: list[Node],
    queue: EvictionQueue,
    num_pages: int,
    num_pinned: int,
    *,
    kept: Mapping[bytes, int],
) -> None:
    """Raise AssertionError for the first thing that is wrong with the tree under `root`."""
    for node in [root, *nodes]:
        _check_links(node)
    for node in nodes:
        _check_run(node)
    _check_counters(nodes, num_pages, num_pinned - (root.pins > 0))
    _check_queue(nodes, queue)
    _check_retains(nodes, kept)


def _check_links(node: Node) -> None:
    _require(node.attached, f"{_name(node)} is in the tree but marked as gone")
    for key, child in node.children.items():
        _require(child.parent is node, f"{_name(child)} has another parent than {_name(node)}")
        _require(key == child.first_key(), f"{_name(child)} is filed under another key")


def _check_run(node: Node) -> None:
    _require(node.length > 0, f"{_name(node)} is empty")
    _require(node.length == len(node.pages), f"{_name(node)} has {len(node.pages)} pages")
    _require(not node.pages.flags.writeable, f"{_name(node)} has pages that can be overwritten")
    keys, rest = divmod(len(node.keys), KEY_BYTES)
    _require(rest == 0 and node.length <= keys <= 2 * node.length, f"{_name(node)}: {keys} keys")
    _require(node.pins >= 0, f"{_name(node)} has {node.pins} pins")


def _check_counters(nodes: list[Node], num_pages: int, num_pinned: int) -> None:
    pages = np.concatenate([node.pages for node in nodes]) if nodes else np.empty(0, np.int64)
    _require(len(pages) == num_pages, f"{len(pages)} pages in the tree, {num_pages} counted")
    _require(len(np.unique(pages)) == len(pages), "a page is in the tree twice")
    pinned = sum(node.pins > 0 for node in nodes)
    _require(pinned == num_pinned, f"{pinned} nodes pinned, {num_pinned} counted")


def _check_queue(nodes: list[Node], queue: EvictionQueue) -> None:
    entries = list(queue)
    counting = [(rank, node) for rank, offer, node in entries if node.entry == offer]
    queued = {id(node) for _, node in counting}
    _require(len(queued) == len(counting), "a node is in the eviction queue twice")
    for node in nodes:
        _require(bool(node.entry) == (id(node) in queued), f"{_name(node)}: wrong `entry`")
        _require(bool(node.entry) or not node.evictable, f"{_name(node)} could go, is not queued")
    gone = queued - {id(node) for node in nodes}
    _require(not gone, f"{len(gone)} nodes in the eviction queue are not in the tree")
    for rank, node in counting:
        _require(rank <= queue.rank(node), f"{_name(node)} is queued with a rank ahead")
    for place, (rank, offer, _) in enumerate(entries):
        above = entries[(place - 1) // 2] if place else entries[0]
        _require(above[:2] <= (rank, offer), f"entry {place} of the queue breaks the heap order")


def _check_retains(nodes: list[Node], kept: Mapping[bytes, int]) -> None:
    seen: Counter[bytes] = Counter()
    for node in nodes:
        if node.kept_until:
            seen[node.tenant] += node.length
    _require(seen == Counter(dict(kept)), f"pages retained are {seen}, counted {kept}")


def _name(node: Node) -> str:
    return f"node {node.first_key().hex()[:8] or 'root'} of {node.length} pages"


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)
