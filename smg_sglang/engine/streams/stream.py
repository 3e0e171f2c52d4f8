"""One request whose context is larger than the device's KV pool; `streams` has them all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from smg_sglang.attention.host import HostRun
from smg_sglang.tier.host_pages import Held
from smg_sglang.tree.page_keys import KEY_BYTES

if TYPE_CHECKING:
    from smg_sglang.engine.streams.table import Streams


@dataclass(eq=False)
class Stream:
    """One streamed request.

    Attributes:
        table: the streams it is one of.
        path: page keys of its pages in host memory, from the root.
        last_hash: SGLang's hex hash of the last of them.
        held: those pages, in order.
        resident_from: tokens before this have no device slots any more.
        host_need: tokens of host memory that it may come to need.
        shared: whether its pages may be found by others; not after the weights have changed.
        failure: why its pages could not leave the device, the last time they had to.
    """

    table: Streams
    req: Any
    host_need: int
    path: bytes = b""
    last_hash: str | None = None
    held: list[Held] = field(default_factory=list)
    resident_from: int = 0
    shared: bool = True
    failure: str | None = None

    @property
    def host_pages(self) -> int:
        return len(self.path) // KEY_BYTES

    @property
    def runs(self) -> list[HostRun]:
        """What attention reads from host memory: exactly the tokens before `resident_from`."""
        runs, missing = [], self.resident_from
        for part in self.held:
            pages = min(part.num_pages, missing // part.run.page_size)
            if pages:
                runs.append(part.first(pages).run)
            missing -= pages * part.run.page_size
        return runs
