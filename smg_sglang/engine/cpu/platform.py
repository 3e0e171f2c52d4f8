"""The platform class behind `engine.cpu.activation.activate`: defaults for serving on CPU cores.

SGLang imports this module while it is itself being imported, so whoever wants it directly has to
`import sglang` first.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from smg_sglang.box import box_memory
from smg_sglang.engine.cpu import convolutions, cores

logger = logging.getLogger(__name__)

THREADS_BIND = "SGLANG_CPU_OMP_THREADS_BIND"
# Remembers a binding that we chose, so that a second Engine in this process may choose again
# while one that the user chose is left alone.
_OWN_BINDING = "SMG_CPU_THREADS_BIND"


class SmgCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Plain CPU through SGLang's pure torch paths, steady when idle and busy on few cores."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def get_device(self, device_id: int = 0) -> str:
        """Return the name, not a torch.device: SGLang 0.5.23 splits it at ':'."""
        return "cpu"

    def get_device_total_memory(self, device_id: int = 0) -> int:
        """Bytes of RAM this process may use, a container's limit included."""
        return box_memory().total

    def get_default_attention_backend(self) -> str:
        """Ours where the plugin has registered it, else torch's own."""
        from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES

        return "smg" if "smg" in ATTENTION_BACKEND_CHOICES else "torch_native"

    def get_compile_backend(self, mode: str | None = None) -> str:
        """No code generation: it needs a C++ compiler and pauses the first request for seconds."""
        return "eager"

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Set defaults in the main process; its children inherit the environment.

        SGLang records what is assigned here as declarations of this platform
        (`arg_groups/platform_hook.py`).
        """
        server_args.sleep_on_idle = True
        # Waiting OpenMP threads of one process must not burn the cores of the next.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        _choose_attention(server_args, self.get_default_attention_backend())
        _choose_binding(server_args)

    def init_backend(self) -> None:
        """In each worker, before anything is computed: one thread a usable core, and plain torch
        where SGLang has kernels for accelerators only."""
        convolutions.install()
        if not os.environ.get("OMP_NUM_THREADS"):
            torch.set_num_threads(len(cores.usable_cores()))

    def get_group_coordinator_device(self, local_rank: int) -> torch.device:
        """Bind this rank to its cores: the one call that each rank makes before it loads weights.

        SGLang's own binding (`init_cpu_threads_env`) is in sgl_kernel, which is not there.
        """
        from sglang.srt.runtime_context import get_device

        bind_rank(get_device().gpu_id)
        return torch.device("cpu")


def bind_rank(gpu_id: int) -> None:
    """Bind the calling thread, and the threads it starts from here on, to the rank's cores.

    gpu_id counts the ranks of all workers on this box. Does nothing where SGLang was given no
    binding; cores that this process may not use are left out.
    """
    groups = cores.parse_binding(os.environ.get(THREADS_BIND, ""))
    if gpu_id >= len(groups):
        return
    own = set(groups[gpu_id]) & os.sched_getaffinity(0)
    if not own:
        return
    os.sched_setaffinity(0, own)
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(len(own))


def _choose_attention(server_args: Any, default: str) -> None:
    """Replace what SGLang chose for a CPU; a backend that the user named stays.

    intel_amx cannot be the user's wish here: it lives in sgl_kernel.
    """
    asked = (getattr(server_args, "_raw_input", None) or {}).get("attention_backend")
    if asked in (None, "intel_amx"):
        server_args.attention_backend = default
    _disable_graphs(server_args)


def _disable_graphs(server_args: Any) -> None:
    """No decode or prefill graphs: SGLang says the same for torch_native, but not for others."""
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

    config = server_args.cuda_graph_config
    if config is None:
        return
    for phase in (Phase.DECODE, Phase.PREFILL):
        config = with_phase(config, phase, backend=Backend.DISABLED)
    server_args.cuda_graph_config = config


def _choose_binding(server_args: Any) -> None:
    """Give each rank its cores where there are several: SGLang wants a NUMA node a rank otherwise.

    A single rank needs no binding: it may use every core, and its loader threads too.
    """
    current = os.environ.get(THREADS_BIND)
    if current is not None and current != os.environ.get(_OWN_BINDING):
        return
    ranks = server_args.tp_size * server_args.pp_size * server_args.dp_size
    if ranks == 1:
        os.environ.pop(THREADS_BIND, None)
        os.environ.pop(_OWN_BINDING, None)
        return
    binding = _binding(ranks, server_args.base_gpu_id, server_args.gpu_id_step)
    os.environ[THREADS_BIND] = os.environ[_OWN_BINDING] = binding
    logger.info("CPU cores of the %d ranks: %s=%s", ranks, THREADS_BIND, binding)


def _binding(ranks: int, base: int, step: int) -> str:
    """One entry a gpu_id: rank r of this server has the gpu_id base + r * step."""
    groups = cores.share_cores(cores.usable_cores(), ranks)
    own = [groups[offset // step] for offset in range((ranks - 1) * step + 1)]
    return cores.format_binding([groups[0]] * base + own)
