"""Where each worker of a split server runs, and how much memory it gets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import msgspec

from smg_sglang.errors import ConfigError
from smg_sglang.phase.requests import Role

#: A prefill worker holds the prompts it works on, a decode worker all chats that go on.
MEMORY_WEIGHT = {Role.PREFILL: 1.0, Role.DECODE: 2.0}


class WorkerPlan(msgspec.Struct, frozen=True):
    """
    Attributes:
        index: among all workers; prefill workers come first.
        gpu_id: SGLang's number of its first rank's device: a CUDA device, or on a CPU the group
            of cores.
        memory_share: of what SGLang would give one server alone on this device.
    """

    index: int
    role: Role
    device: str
    gpu_id: int
    memory_share: float

    @property
    def name(self) -> str:
        return f"{self.role} worker {self.index}"


def make_plan(
    roles: Sequence[Role],
    *,
    tp_size: int,
    num_cuda: int,
    prefill_devices: str | None = None,
    decode_devices: str | None = None,
) -> list[WorkerPlan]:
    """One plan a worker.

    Args:
        num_cuda: CUDA devices there are; 0 means all workers run on the CPU.
        prefill_devices, decode_devices: as the flags give them, "cuda:0,cuda:1"; one for all, or
            one a worker. By default each worker has `tp_size` CUDA devices of its own, or all
            share the first ones where there are too few.

    Raises:
        ConfigError: one sentence that says which flag to change.
    """
    if num_cuda == 0:
        _only_cpu(prefill_devices, decode_devices)
        firsts = [index * tp_size for index in range(len(roles))]
        return _share(roles, ["cpu"] * len(roles), firsts)
    firsts = _default_firsts(len(roles), tp_size, num_cuda)
    for role, text in ((Role.PREFILL, prefill_devices), (Role.DECODE, decode_devices)):
        mine = [index for index, one in enumerate(roles) if one is role]
        if text is not None:
            for index, first in zip(mine, _parse(role, text, len(mine)), strict=True):
                firsts[index] = first
    for first in firsts:
        if first + tp_size > num_cuda:
            raise ConfigError(
                f"a worker on cuda:{first} with --tp-size {tp_size} needs {first + tp_size} CUDA "
                f"devices, and there are {num_cuda}; choose other --smg-prefill-devices or "
                "--smg-decode-devices."
            )
    return _share(roles, [f"cuda:{first}" for first in firsts], firsts)


def _default_firsts(workers: int, tp_size: int, num_cuda: int) -> list[int]:
    apart = workers * tp_size <= num_cuda
    return [index * tp_size if apart else 0 for index in range(workers)]


def _only_cpu(*texts: str | None) -> None:
    for text in texts:
        if text is not None and set(text.split(",")) != {"cpu"}:
            raise ConfigError(f"there is no CUDA device here, so {text!r} must be cpu.")


def _parse(role: Role, text: str, workers: int) -> list[int]:
    names = text.split(",")
    flag = f"--smg-{role}-devices"
    if len(names) == 1:
        names *= workers
    if len(names) != workers:
        raise ConfigError(f"{flag} must name one device, or one for each of {workers} workers.")
    if "cpu" in names:
        raise ConfigError(
            f"{flag} cpu beside CUDA devices is not supported yet; name CUDA devices only."
        )
    numbers = [name.removeprefix("cuda:") for name in names]
    if not all(number.isdigit() for number in numbers):
        raise ConfigError(f"{flag} must look like cuda:0,cuda:1, not {text!r}.")
    return [int(number) for number in numbers]


def _share(
    roles: Sequence[Role], devices: Sequence[str], firsts: Sequence[int]
) -> list[WorkerPlan]:
    weights: dict[str, float] = defaultdict(float)
    for role, device in zip(roles, devices, strict=True):
        weights[device] += MEMORY_WEIGHT[role]
    return [
        WorkerPlan(index, role, device, first, MEMORY_WEIGHT[role] / weights[device])
        for index, (role, device, first) in enumerate(zip(roles, devices, firsts, strict=True))
    ]
