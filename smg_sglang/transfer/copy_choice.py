"""Which of two ways to copy on CUDA, from figures or by order. Measures nothing itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Method = Literal["kernel", "copies"]
"""How `CudaMover` copies pages that are page-locked: by a Triton kernel, or by the copy engines."""

VARIABLE = "SMG_COPY_METHOD"
"""Environment variable that names a method for both directions, instead of measuring."""

SPILL_LEEWAY = 0.9
"""The share of the kernel's rate from which on the copy engines spill: they take no SMs from a
decode that runs meanwhile, which figures of an idle device do not show. The tenth is an estimate.
For loads, which a forward waits for, the faster one is taken."""


@dataclass(frozen=True)
class CopyMethods:
    """A method for each direction. The default is what runs where nothing was measured."""

    load: Method = "kernel"
    spill: Method = "kernel"


@dataclass(frozen=True)
class CopyRates:
    """One direction by each method, in 10^9 bytes/s."""

    kernel: float
    copies: float

    def better(self, leeway: float = 1.0) -> Method:
        """The faster one; the copy engines from that share of the kernel's rate on."""
        return "copies" if self.copies >= leeway * self.kernel else "kernel"


@dataclass(frozen=True)
class CopyChoice:
    """What `/server_info` shows.

    Attributes:
        why: "measured", or in words why nothing was.
        load_gbps, spill_gbps: what was measured.
    """

    methods: CopyMethods
    why: str
    load_gbps: CopyRates | None = None
    spill_gbps: CopyRates | None = None

    @classmethod
    def measured(cls, load: CopyRates, spill: CopyRates) -> CopyChoice:
        methods = CopyMethods(load.better(), spill.better(SPILL_LEEWAY))
        return cls(methods, "measured", load, spill)

    def state(self) -> dict[str, Any]:
        """As builtins."""
        return asdict(self)

    def __str__(self) -> str:
        directions = (
            ("loads", self.methods.load, self.load_gbps),
            ("spills", self.methods.spill, self.spill_gbps),
        )
        return ", ".join(
            f"{name} by {method}"
            + (f" (kernel {rates.kernel:.1f}, copies {rates.copies:.1f} GB/s)" if rates else "")
            for name, method, rates in directions
        )


def ordered(environment: Mapping[str, str]) -> CopyChoice | None:
    """What the environment says, or None where it leaves the choice to us.

    Raises:
        ValueError: it names no method.
    """
    name = environment.get(VARIABLE)
    if name is None:
        return None
    for method in get_args(Method):
        if name == method:
            return CopyChoice(CopyMethods(method, method), f"{VARIABLE}={name}")
    raise ValueError(f"{VARIABLE} must be {' or '.join(get_args(Method))}, not {name!r}")
