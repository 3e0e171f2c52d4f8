"""A page as it lies in storage: its bytes, and a seal that tells whether they are still those.

The seal covers the object's name too, so that a page that lies under another's name is refused.
"""

import struct

import msgspec
import numpy as np
import xxhash

from smg_sglang.memory.namespace import Namespace
from smg_sglang.tree.page_keys import KEY_BYTES

_MAGIC = b"smgpage1"
_SEAL = struct.Struct("<8sQ16s")  # magic, bytes of the page, xxh3-128 of name and page

#: Bytes that an object has beyond its page.
SEAL_BYTES = _SEAL.size


def object_suffix(namespace: Namespace) -> str:
    """What the names of all objects of a namespace end in: a digest of all that must be equal for
    two workers to read each other's pages (weights, dtype, layout, page size, rank)."""
    return "-" + xxhash.xxh3_128_hexdigest(msgspec.json.encode(namespace, order="sorted"))


def object_names(path: bytes, suffix: str) -> list[str]:
    """The objects of the pages of a path, by page key."""
    keys = (path[at : at + KEY_BYTES] for at in range(0, len(path), KEY_BYTES))
    return [key.hex() + suffix for key in keys]


def seal(name: str, page: np.ndarray, sealed: np.ndarray) -> None:
    """Write page (uint8[n]) and seal to `sealed` (uint8[n + SEAL_BYTES])."""
    sealed[: page.size] = page
    digest = _digest(name, sealed[: page.size])
    sealed[page.size :] = np.frombuffer(_SEAL.pack(_MAGIC, page.size, digest), np.uint8)


def unseal(name: str, sealed: np.ndarray) -> np.ndarray | None:
    """The page in `sealed`, a view; None where any byte is not what was sealed under this name."""
    page = sealed[:-SEAL_BYTES]
    magic, size, digest = _SEAL.unpack(sealed[-SEAL_BYTES:].tobytes())
    if magic != _MAGIC or size != page.size or digest != _digest(name, page):
        return None
    return page


def _digest(name: str, page: np.ndarray) -> bytes:
    digest = xxhash.xxh3_128(name.encode())
    digest.update(page.data)
    return digest.digest()
