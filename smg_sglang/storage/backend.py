"""What the storage tier asks of whatever stores the bytes."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Backend(Protocol):
    """Objects of bytes under names. Each method may block for any time and raise anything: callers
    are lanes. `exists`, `get` and `put` may be called by three threads at the same time."""

    def exists(self, names: Sequence[str]) -> int:
        """How many of them are there, from the first on without a gap."""

    def get(self, names: Sequence[str], into: np.ndarray) -> list[bool]:
        """Read each to its row of `into`, uint8[n, bytes]; which are there in full. What lies in
        the other rows then is undefined."""

    def put(self, names: Sequence[str], rows: np.ndarray) -> list[bool]:
        """Keep rows, uint8[n, bytes], under their names; which are kept (or have been before)."""

    def discard(self, name: str) -> None:
        """Forget an object whose bytes have gone bad, if the backend can."""
