"""An SGLang `HiCacheStorage` backend as a `Backend` of ours."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    PoolName,
    PoolTransfer,
)
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

from smg_sglang.errors import ConfigError


class RowPool:
    """What SGLang's backends know as a host pool (`mem_cache/pool_host`): one page a slot, each an
    opaque object of bytes. The slots are the rows of the call that this thread is in.
    """

    layout = "page_first"
    page_size = 1

    def __init__(self) -> None:
        self._current = threading.local()

    @contextlib.contextmanager
    def of(self, rows: np.ndarray) -> Any:
        """For this thread, slot i is `rows[i]`, uint8[n, bytes], until the end of the block."""
        self._current.rows = rows
        try:
            yield torch.arange(len(rows))
        finally:
            del self._current.rows

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:
        """uint8[bytes], the slot's own memory."""
        return torch.from_numpy(self._current.rows[int(index)])

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        """uint8[bytes], of nobody."""
        return torch.empty(self._current.rows.shape[1], dtype=torch.uint8)

    # What Mooncake asks, which reads and writes by address memory that it was told of.

    kv_buffer = torch.empty(0)
    """Not None, or there would be no pages to it."""

    def get_hybrid_pool_buffer(self) -> list[torch.Tensor]:
        """Rows are registered as they come (`MooncakeBackend`)."""
        return []

    def get_ksize_per_token(self) -> int:
        """For metrics, which are off."""
        return 0

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        """Address and bytes of each slot."""
        rows = self._current.rows
        return [rows[i].ctypes.data for i in indices.tolist()], [rows.shape[1]] * len(indices)

    def set_from_flat_data_page(self, index: int, page: torch.Tensor) -> None:
        """Copy `page` to the slot."""
        self._current.rows[int(index)] = page.numpy()


class SglangBackend:
    """Drives a backend by its v2 interface, which takes a pool and slots. Three threads at a time.
    (A `Backend`.)"""

    def __init__(self, backend: HiCacheStorage) -> None:
        self._backend = backend
        self._pool = RowPool()
        backend.register_mem_pool_host(self._pool)
        backend.register_mem_host_pool_v2(self._pool, PoolName.KV)

    def exists(self, names: Sequence[str]) -> int:
        return int(self._backend.batch_exists(list(names)))

    def get(self, names: Sequence[str], into: np.ndarray) -> list[bool]:
        try:
            return self._transfer(self._backend.batch_get_v2, names, into)
        except OSError:
            # A short file: which one it is, each tells for itself.
            return [self._get_one(name, row) for name, row in zip(names, into, strict=True)]

    def _get_one(self, name: str, row: np.ndarray) -> bool:
        try:
            return self._transfer(self._backend.batch_get_v2, [name], row[None])[0]
        except OSError:
            return False

    def put(self, names: Sequence[str], rows: np.ndarray) -> list[bool]:
        return self._transfer(self._backend.batch_set_v2, names, rows)

    def _transfer(self, call: Any, names: Sequence[str], rows: np.ndarray) -> list[bool]:
        with self._pool.of(rows) as slots:
            done = call([PoolTransfer(PoolName.KV, host_indices=slots, keys=list(names))])
        return [bool(each) for each in done[PoolName.KV]]

    def discard(self, name: str) -> None:
        """SGLang's interface has no word for it; the file backend's objects are files."""
        folder = getattr(self._backend, "file_path", None)
        suffixed = getattr(self._backend, "_get_suffixed_key", None)
        if folder is not None and suffixed is not None:
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, f"{suffixed(name)}.bin"))


class MooncakeBackend(SglangBackend):
    """Mooncake Store, whose v1 calls are for its first pool; it moves bytes from and to memory that
    is registered with its transfer engine."""

    def __init__(self, backend: HiCacheStorage) -> None:
        super().__init__(backend)
        self._registered: dict[int, np.ndarray] = {}
        self._registering = threading.Lock()

    def get(self, names: Sequence[str], into: np.ndarray) -> list[bool]:
        return self._call(self._backend.batch_get_v1, names, into)

    def put(self, names: Sequence[str], rows: np.ndarray) -> list[bool]:
        return self._call(self._backend.batch_set_v1, names, rows)

    def _call(self, call: Any, names: Sequence[str], rows: np.ndarray) -> list[bool]:
        self._register(rows)
        with self._pool.of(rows) as slots:
            return [bool(each) for each in call(list(names), slots)]

    def _register(self, rows: np.ndarray) -> None:
        """The whole buffer that the rows are part of; it is kept, since Mooncake knows it by its
        address now. A lane has one, and another after it has grown."""
        buffer = rows if rows.base is None or rows.base.__class__ is not np.ndarray else rows.base
        with self._registering:
            if buffer.ctypes.data not in self._registered:
                self._backend.register_buffer(torch.from_numpy(buffer.reshape(-1)))
                self._registered[buffer.ctypes.data] = buffer

    def discard(self, name: str) -> None:
        """What is broken in one replica is so for all; the store forgets it."""
        self._backend.store.remove(f"{self._backend._tag_keys([name])[0]}__k")


#: What SGLang's backends are driven by, where it is not the v2 interface.
DRIVERS: dict[str, type[SglangBackend]] = {"mooncake": MooncakeBackend}


def _check_interface(backend: HiCacheStorage) -> None:
    for method in ("batch_get_v2", "batch_set_v2"):
        if getattr(type(backend), method, None) is getattr(HiCacheStorage, method):
            raise NotImplementedError(f"{type(backend).__name__} has no {method}")


def open_backend(name: str, settings: Mapping[str, Any]) -> SglangBackend:
    """Raises ConfigError, in one sentence: it cannot be imported or opened."""
    # All that pages of one rank depend on is in their names, so that to SGLang there is one rank
    # only, whose page is one object.
    config = HiCacheStorageConfig(
        tp_rank=0,
        tp_size=1,
        pp_rank=0,
        pp_size=1,
        attn_cp_rank=0,
        attn_cp_size=1,
        is_mla_model=True,
        enable_storage_metrics=False,
        is_page_first_layout=True,
        model_name=None,
        extra_config=dict(settings),
    )
    try:
        backend = StorageBackendFactory.create_backend(name, config, RowPool())
        driver = DRIVERS.get(name, SglangBackend)
        if driver is SglangBackend:
            _check_interface(backend)
        return driver(backend)
    except Exception as error:
        raise ConfigError(f"SGLang's storage backend {name!r} cannot be opened: {error}") from error
