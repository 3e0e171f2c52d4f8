"""Which kernels attend a model's keys on CUDA: chosen once, when its worker starts."""

from __future__ import annotations

from enum import Enum

import torch

from smg_sglang.attention.exact import ExactKernels
from smg_sglang.attention.flashinfer import LatentKernels, PagedKernels
from smg_sglang.attention.paged import Heads, Kernels
from smg_sglang.errors import ConfigError

#: FlashInfer has no others.
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (*HALVES, torch.float32)


class Kind(Enum):
    """PAGED: FlashInfer's for keys and values. LATENT: its for MLA. EXACT: plain products."""

    PAGED = "paged"
    LATENT = "latent"
    EXACT = "exact"


def kind_of(heads: Heads, latent: bool) -> Kind:
    """The fastest kernels that have this shape; latent: values are the front of the keys (MLA)."""
    if heads.dtype not in HALVES:
        return Kind.EXACT
    if latent:
        return Kind.LATENT if _is_flashinfers_latent(heads) else Kind.EXACT
    # FlashInfer's FA2 loads and stores whole 64s of a head (`prefill.cuh`), and says nothing.
    whole = heads.v_dim == heads.dim and heads.dim % 64 == 0
    return Kind.PAGED if whole else Kind.EXACT


def _is_flashinfers_latent(heads: Heads) -> bool:
    """FlashInfer's MLA has latents of whole 128s beside rope dimensions of whole 64s
    (`_validate_generated_fa_plan`). Query heads that do not divide its tiles it refuses now and
    then, with the lengths (`_validate_fa_causal_tile_bound`), so here they are refused always."""
    sizes = heads.v_dim % 128 == 0 and (heads.dim - heads.v_dim) % 64 == 0
    return sizes and heads.query <= 128 and 128 % heads.query == 0


def make_kernels(
    kind: Kind,
    device: torch.device,
    workspace: torch.Tensor | None = None,
    backend: str | None = None,
) -> Kernels:
    """Args: workspace and backend, as for `flashinfer.Wrappers`."""
    if kind is Kind.EXACT:
        return ExactKernels(device)
    make = PagedKernels if kind is Kind.PAGED else LatentKernels
    return make(device, workspace, backend)


def check_dtypes(queries: torch.dtype, keys: torch.dtype) -> None:
    """Raise ConfigError for dtypes that cannot be streamed on CUDA."""
    if queries not in DTYPES or keys != queries:
        names = (str(dtype).removeprefix("torch.") for dtype in (queries, keys))
        raise ConfigError(
            "contexts are streamed from host memory on CUDA in bfloat16, float16 or float32, "
            "queries and KV alike, not {} over {}: choose with --dtype and --kv-cache-dtype auto, "
            "or leave --smg-stream-context out".format(*names)
        )
