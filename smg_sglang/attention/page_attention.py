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
    """The fastest that this machine has; builds the kernel where it is not there, some seconds.

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
        "attention in host memory runs with torch, which is slower: the C kernel could not be "
        "built (%s)",
        failures[0] if failures else "no instruction set is known",
    )
    return TorchAttention()


def native(
    variant: Variant, threads: int, cores: Sequence[int] = (), folder: Path | None = None
) -> NativeAttention:
    """The kernel for one instruction set, which this CPU must have.

    Raises BuildError or OSError where it cannot be built or loaded.
    """
    path = built(variant, folder)
    try:
        return NativeAttention(path, variant.name, threads, cores)
    except OSError:  # a file that some crash left half written
        path.unlink()
        return NativeAttention(built(variant, folder), variant.name, threads, cores)
