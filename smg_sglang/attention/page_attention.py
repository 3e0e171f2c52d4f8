"""Which code attends to pages in place: the C kernel for this CPU, or torch where there is none."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from smg_sglang.attention.native.build import BuildError, Variant, built, runnable
from smg_sglang.attention.native.kernel import NativeAttention
from smg_sglang.attention.pages import PageAttention
from smg_sglang.attention.torch_pages import TorchAttention

log = logging.getLogger(__name__)


def make_page_attention(
    threads: int, cores: Sequence[int] = (), folder: Path | None = None
) -> PageAttention:
    """The fastest that this machine has: `find_native`'s, or torch."""
    return find_native(threads, cores, folder) or TorchAttention()


def find_native(
    threads: int, cores: Sequence[int] = (), folder: Path | None = None
) -> NativeAttention | None:
    """The C kernel for this CPU, built where it is not there yet (some seconds); None, and a line
    in the log, where it cannot be built.

    threads: that compute, the caller's among them; none is started before a call needs it.
    cores: those that the others may run on. folder: as for `build.built`.
    """
    failures = []
    for variant in runnable():
        try:
            return native(variant, threads, cores, folder)
        except (BuildError, OSError) as error:
            failures.append(f"{variant.name}: {error}")
    log.warning(
        "the C kernel for attention in host memory could not be built, what stands in for it is "
        "slower (%s)",
        failures[0],
    )
    return None


def native(
    variant: Variant, threads: int, cores: Sequence[int] = (), folder: Path | None = None
) -> NativeAttention:
    """The kernel for one instruction set, which this CPU must have.

    Raises BuildError or OSError where it cannot be built or loaded.
    """
    return NativeAttention(built(variant, folder), variant.name, threads, cores)
