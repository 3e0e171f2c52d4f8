"""Whether all that the bundled distributions say they require is bundled or on the target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

from tools.gpu_bundle.parts import ON_TARGET, PYTHON

#: Their needs are chosen by hand (`parts`): most of what they list is for other models.
BY_HAND = frozenset({"sglang", "sglang-kernel", "flashinfer-python", "smg-sglang"})


def missing(site: Path) -> list[str]:
    """Sentences, one for each requirement that nothing meets."""
    bundled = {canonicalize_name(d.metadata["Name"]): d for d in distributions(path=[str(site)])}
    return [
        f"{name} requires {requirement}, which is neither bundled nor on the target"
        for name, distribution in sorted(bundled.items())
        if name not in BY_HAND
        for requirement in _needs(distribution)
        if not _is_met(requirement, bundled)
    ]


def _is_met(requirement: Requirement, bundled: Mapping[NormalizedName, Distribution]) -> bool:
    name = canonicalize_name(requirement.name)
    if name in bundled:
        return requirement.specifier.contains(bundled[name].version, prereleases=True)
    return name in ON_TARGET


def _needs(distribution: Distribution) -> Iterator[Requirement]:
    target = {"python_version": PYTHON, "sys_platform": "linux", "platform_system": "Linux"}
    target |= {"python_full_version": f"{PYTHON}.3", "platform_machine": "x86_64", "extra": ""}
    for text in distribution.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate(target):
            yield requirement
