"""How the tensor-parallel ranks of one worker share the work on host memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """One rank's view of the ranks that do the same at the same time, each for its own device.

    Attributes:
        rank: this one.
        size: how many there are.
        alike: they all have the same KV (latents of MLA, which no rank has a share of). Then host
            memory has it once: the first rank writes it and all read it, each with leases of its
            own, since one may be slower with its copies than another.
    """

    rank: int = 0
    size: int = 1
    alike: bool = False

    @property
    def writes(self) -> bool:
        """Whether this rank copies to host memory."""
        return not self.alike or self.rank == 0

    @property
    def take_turns(self) -> bool:
        """Whether the others have to wait where they want to read what the first has written."""
        return self.alike and self.size > 1

    @property
    def shard(self) -> int:
        """Which of the namespaces of its worker this rank's pages are in."""
        return 0 if self.alike else self.rank

    @property
    def shards(self) -> int:
        """How many namespaces the worker has: how often a token is in host memory."""
        return 1 if self.alike else self.size


ALONE = Ranks()
