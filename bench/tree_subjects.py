"""The trees that `bench/tree.py` compares, behind one interface."""

from __future__ import annotations

import itertools
import logging
import os
import warnings
from array import array
from typing import Any, Protocol

import numpy as np

from smg_sglang.tree.page_keys import page_keys
from smg_sglang.tree.radix_tree import RadixTree

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# SGLang warns of what a CPU lacks as it is imported.
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)


class Subject(Protocol):
    """A tree under test. `prepare` is not timed; the rest is."""

    name: str

    def prepare(self, tokens: np.ndarray) -> Any: ...
    def match(self, prompt: Any) -> int: ...
    def pages(self, prompt: Any) -> int: ...
    def insert(self, prompt: Any) -> None: ...
    def use(self, prompt: Any) -> None: ...
    def evict(self, tokens: int) -> int: ...


class Ours:
    """RadixTree, with or without computing the page keys in each call."""

    def __init__(self, page_size: int, with_keys: bool = False):
        self.name = "RadixTree + keys" if with_keys else "RadixTree"
        self._page_size, self._with_keys = page_size, with_keys
        self.tree = RadixTree()

    def prepare(self, tokens: np.ndarray) -> Any:
        path = b"" if self._with_keys else page_keys(tokens, self._page_size)
        return array("q", tokens.tobytes()), path, _fresh(len(tokens) // self._page_size)

    def match(self, prompt: Any) -> int:
        return self.tree.match(self._path(prompt)).length * self._page_size

    def pages(self, prompt: Any) -> int:
        return 0

    def insert(self, prompt: Any) -> None:
        self.tree.insert(self._path(prompt), prompt[2])

    def evict(self, tokens: int) -> int:
        return len(self.tree.evict(tokens // self._page_size)) * self._page_size

    def use(self, prompt: Any) -> None:
        self.tree.touch(self.tree.match(self._path(prompt)))

    def _path(self, prompt: Any) -> bytes:
        return page_keys(prompt[0], self._page_size) if self._with_keys else prompt[1]


class SglangPython:
    """SGLang's RadixCache in Python."""

    name = "SGLang RadixCache"

    def __init__(self, page_size: int):
        import torch
        from sglang.srt.mem_cache import base_prefix_cache, radix_cache

        class Discard:
            device = "cpu"

            def free_segment(self, *_: Any, **__: Any) -> None:
                """The pages go nowhere."""

        self._api, self._key, self._torch = base_prefix_cache, radix_cache.RadixKey, torch
        self._tree = radix_cache.RadixCache.create_simulated(
            mock_allocator=Discard(), page_size=page_size
        )

    def prepare(self, tokens: np.ndarray) -> Any:
        key = self._key(array("q", tokens.tobytes()))
        return key, self._torch.from_numpy(_fresh(len(tokens)))

    def match(self, prompt: Any) -> int:
        self._found = self._tree.match_prefix(self._api.MatchPrefixParams(key=prompt[0]))
        return self._found.device_prefix_len

    def pages(self, prompt: Any) -> int:
        return len(self._tree.path_device_indices(self._found.last_device_node))

    def insert(self, prompt: Any) -> None:
        self._tree.insert(self._api.InsertParams(key=prompt[0], value=prompt[1]))

    def use(self, prompt: Any) -> None:
        self.match(prompt)  # which counts as a use here

    def evict(self, tokens: int) -> int:
        return self._tree.evict(self._api.EvictParams(num_tokens=tokens)).num_tokens_evicted


class SglangRust(SglangPython):
    """The core of SGLang's UnifiedRadixCache in Rust."""

    name = "SGLang Rust core"

    def __init__(self, page_size: int):
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.rust_tree_core.adapter import RustUnifiedTreeCore
        from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

        super().__init__(page_size)
        self._full = ComponentType.FULL
        self._tree = RustUnifiedTreeCore(
            CacheInitParams(
                disable=False,
                req_to_token_pool=None,
                token_to_kv_pool_allocator=None,
                page_size=page_size,
                tree_components=(self._full,),
            )
        )

    def pages(self, prompt: Any) -> int:
        node, root = self._found.last_device_node, self._tree.root_node_handle(None)
        return len(self._tree.collect_full_device_indices(node, root))

    def insert(self, prompt: Any) -> None:
        step = self._tree.begin_insert(self._api.InsertParams(key=prompt[0], value=prompt[1]))
        while step.result is None:
            step = self._tree.resume_insert()
        self._tree.end_insert()

    def evict(self, tokens: int) -> int:
        core, tracker = self._tree, {self._full: 0}
        core.evict_device_start(self._full, tokens)
        while (node := core.evict_device_next_node(self._full, tracker).node_id) is not None:
            result = core.evict_device_leaf(node, False)
            tracker[self._full] += result.tracker[self._full]
            result.device_frees.clear()
        core.evict_device_end(self._full)
        return tracker[self._full]


_numbers = itertools.count()


def _fresh(count: int) -> np.ndarray:
    """Page or slot numbers nobody has had."""
    start = next(_numbers) << 24
    return np.arange(start, start + count, dtype=np.int64)
