"""Short causal convolutions in plain torch, where SGLang has kernels for accelerators only.

Correct, and quick enough for tests: hybrid models (LFM2) then run on the plain-CPU platform.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


def install() -> None:
    """Stand in for SGLang's Triton kernels, in this process."""
    from sglang.srt.layers.attention.mamba import causal_conv1d

    causal_conv1d._causal_conv1d_fn_triton = convolve_prompts
    causal_conv1d._causal_conv1d_update_triton = convolve_tokens


def convolve_prompts(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    conv_states: torch.Tensor,
    query_start_loc: torch.Tensor,
    cache_indices: torch.Tensor,
    has_initial_state: torch.Tensor,
    activation: str | None = "silu",
    **_: Any,
) -> torch.Tensor:
    """A depthwise causal convolution of several prompts, each from its own state.

    Args:
        x: [dim, tokens], the prompts one after the other.
        weight, bias: [dim, width] and [dim].
        conv_states: [slots, dim, width - 1], the newest inputs; written.
        query_start_loc: int32 [prompts + 1], where each begins.
        cache_indices: [prompts], its slot; negative: it is padding.
        has_initial_state: bool [prompts], whether it goes on from its slot.

    Returns:
        [dim, tokens], dtype of x.
    """
    out = torch.empty_like(x)
    places = query_start_loc.tolist()
    for n, slot in enumerate(cache_indices.tolist()):
        begin, end = places[n], places[n + 1]
        if slot < 0 or begin == end:
            continue
        state = conv_states[slot]
        before = state if bool(has_initial_state[n]) else torch.zeros_like(state)
        inputs = torch.cat([before.to(x.dtype), x[:, begin:end]], dim=1)
        out[:, begin:end] = _convolve(inputs, weight, bias, activation)
        state.copy_(inputs[:, inputs.shape[1] - state.shape[1] :])
    return out


def convolve_tokens(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    conv_state_indices: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    """The same for one more token of each request.

    Args:
        x: [requests, dim].
        conv_state: [slots, dim, width - 1]; written.
        conv_state_indices: [requests], their slots; negative: padding.

    Returns:
        [requests, dim], dtype of x.
    """
    out = torch.zeros_like(x)
    live = conv_state_indices >= 0
    slots = conv_state_indices[live].to(torch.int64)
    inputs = torch.cat([conv_state[slots].to(x.dtype), x[live].unsqueeze(-1)], dim=-1)
    out[live] = _convolve(inputs, weight, bias, activation).squeeze(-1)
    conv_state[slots] = inputs[..., 1:].to(conv_state.dtype)
    return out


def _convolve(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> torch.Tensor:
    out = functional.conv1d(inputs, weight.unsqueeze(1), bias, groups=weight.shape[0])
    return functional.silu(out) if activation in ("silu", "swish") else out
