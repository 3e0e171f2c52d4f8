"""The flags that suit what was found."""

from __future__ import annotations

import msgspec

from smg_sglang.box import GIB, BoxMemory
from smg_sglang.config import (
    DEFAULT_EVICTION,
    DEFAULT_SHARE,
    MIN_HOST_GB,
    OPTIONS,
    EvictionName,
    SmgConfig,
    WritePolicy,
)
from smg_sglang.config.flags import ENABLE
from smg_sglang.doctor.link import Link

_SLOW_SPILLS_GBPS = 1.0


class Recommendation(msgspec.Struct, frozen=True):
    """Values for a server's flags, and why."""

    host_gb: float
    page_size: int
    eviction_policy: EvictionName
    write_policy: WritePolicy
    reasons: list[str]

    @property
    def flags(self) -> str:
        """As they are written on a command line."""
        chosen = {**msgspec.structs.asdict(self), "host_gb": f"{self.host_gb:g}"}
        given = [f"{o.flag} {chosen[field]}" for field, o in OPTIONS.items() if field in chosen]
        return " ".join([ENABLE, *given])


def recommend(box: BoxMemory, links: list[Link], *, cuda: bool) -> Recommendation:
    """The defaults, fitted to this machine.

    Args:
        links: none where none could be measured.
        cuda: whether a server would run on CUDA.
    """
    share = DEFAULT_SHARE["cuda" if cuda else "cpu"]
    reasons = [
        f"host memory: {share:.0%} of what is free; the rest is for weights, "
        f"{'pinned buffers' if cuda else 'the KV pool'} and others",
        "page size: the default; half a page of each shared prefix is lost on average",
        f"eviction: {DEFAULT_EVICTION} saves most prefill work on the traces in docs/simulator.md; "
        "`smg_sglang simulate` compares them on yours",
    ]
    write_policy = WritePolicy.WRITE_THROUGH
    if links and min(link.to_host_gbps for link in links) < _SLOW_SPILLS_GBPS:
        write_policy = WritePolicy.SELECTIVE
        reasons.append("write policy: the link is slow, so only what is used twice is copied")
    return Recommendation(
        # A server takes no less than this.
        host_gb=max(MIN_HOST_GB, float(f"{box.available / GIB * share:.3g}")),
        page_size=SmgConfig().page_size,
        eviction_policy=DEFAULT_EVICTION,
        write_policy=write_policy,
        reasons=reasons,
    )
