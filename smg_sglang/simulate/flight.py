"""A request on its way through the simulated server."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from smg_sglang.simulate.device import Pages
from smg_sglang.simulate.paths import RequestPath
from smg_sglang.trace.request import Request
from smg_sglang.tree.node import Node


@dataclass(eq=False)
class Flight:
    """What the request holds. Page counts are from the root.

    `pages` are the device pages of its tokens: [0, in_tree) belong to the tree, which `node` keeps
    locked; the rest is its own until it inserts them or ends.
    """

    request: Request
    path: RequestPath
    arrived_s: float
    needed_pages: int
    """Device pages of all its tokens."""
    pages: Pages = field(default_factory=lambda: np.empty(0, np.int64))
    in_tree: int = 0
    counted: int = 0
    """Pages for which this request has been counted as an insertion."""
    node: Node | None = None
    lease: int | None = None
    device_pages: int = 0
    """Found on the device."""
    host_pages: int = 0
    """Found in host memory, beyond those."""
    asked_storage: bool = False
    fetching: bool = False
    """It waits for storage, and others go first."""
    stored_pages: int = 0
    """Brought from storage to host memory for it."""
    done: int = 0
    """Prompt tokens whose KV is there."""
    promised: int = 0
    """Pages it will still take."""

    @property
    def remaining(self) -> int:
        """Prompt tokens to compute."""
        return self.request.input_tokens - self.done
