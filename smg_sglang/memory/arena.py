"""The arena: host memory for pages, one sealed memfd that every client maps."""

import fcntl
import mmap
import os
import weakref

import msgspec
import numpy as np

from smg_sglang.errors import MemoryUnavailable

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class PageGeometry(msgspec.Struct, frozen=True):
    """Where the pages of one size lie. Page number = slab * pages_per_slab + place in slab."""

    slab_bytes: int
    pages_per_slab: int
    page_bytes: int

    def offsets(self, pages: np.ndarray) -> np.ndarray:
        """Byte offsets in the arena (int64[n]) of `pages` (int64[n])."""
        slabs, places = np.divmod(pages, self.pages_per_slab)
        return np.asarray(slabs * self.slab_bytes + places * self.page_bytes, dtype=np.int64)


def create_memfd(nbytes: int) -> int:
    """A new memfd of `nbytes`, sealed: nobody can shrink it under a reader (SIGBUS)."""
    fd = os.memfd_create("smg-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd


class Arena:
    """One process's mapping of the arena.

    `buffer` (uint8[nbytes], shared and writable) keeps the mapping alive, and so does every
    view of it: an arena whose server is gone stays readable until the last lease is dropped.
    Reading or writing it is safe from any thread; who may touch which page is settled by leases.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        """Map `fd`, which stays the caller's. Raises MemoryUnavailable if it may shrink."""
        if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise MemoryUnavailable("the memory server's arena is not sealed against shrinking")
        self._map = mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self.nbytes = nbytes
        self.buffer = np.frombuffer(self._map, dtype=np.uint8)
        try:
            self._map.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a hint; many kernels have no huge pages for memfds
            pass


class ArenaMappings:
    """Lets the connections of one process to one server share a mapping (and its pinning)."""

    def __init__(self) -> None:
        self._by_epoch: weakref.WeakValueDictionary[str, Arena] = weakref.WeakValueDictionary()

    def attach(self, epoch: str, fd: int, nbytes: int) -> Arena:
        """The mapping of server instance `epoch`: the one that is there, or a new one of `fd`."""
        arena = self._by_epoch.get(epoch)
        if arena is None:
            arena = self._by_epoch[epoch] = Arena(fd, nbytes)
        return arena
