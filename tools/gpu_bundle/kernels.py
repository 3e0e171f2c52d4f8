"""Compiles the kernels of a bundle; a child process, in the environment that `toolkit` makes.

    python -m tools.gpu_bundle.kernels OUT

FlashInfer's go to OUT/flashinfer/NAME/NAME.so, where FlashInfer looks for what was compiled
beforehand, SGLang's to OUT/sglang/NAME.so. Neither links to PyTorch or Python. What is there is
kept.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Build = Callable[[Path], None]


def flashinfer_kernels() -> Iterator[tuple[str, Build]]:
    """Prefill and decode of bf16 keys and values, latents of DeepSeek, merging, sampling."""
    import torch
    from flashinfer.jit import cascade, sampling
    from flashinfer.jit.attention import modules

    bf16, ids = torch.bfloat16, torch.int32
    specs = [cascade.gen_cascade_module()]
    for keys, values in ((128, 128), (64, 64), (192, 128)):
        rest = (bf16, bf16, bf16, ids, keys, values, 0, False, False)
        specs.append(modules.gen_batch_prefill_module("fa2", *rest, False))
        if keys == values:  # DeepSeek's prompts only prefill so
            specs.append(modules.gen_batch_decode_module(*rest))
    for backend in ("fa2", "fa3"):
        latent = (bf16, bf16, bf16, ids, 512, 64, False)
        specs.append(modules.gen_batch_mla_module(backend, *latent))
    specs.append(sampling.gen_sampling_module())
    for spec in specs:
        yield spec.name, _flashinfer_build(spec)


def _flashinfer_build(spec: Any) -> Build:
    def build(target: Path) -> None:
        spec.build()
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(spec.jit_library_path, target)

    return build


def sglang_kernels(out: Path) -> None:
    """Into `out`, out of SGLang's own cache where it has them: what a dense or MLA model in bf16
    asks SGLang's loader for."""
    import torch
    from sglang.kernels.jit.utils.compile import loader
    from sglang.kernels.ops.activation import activation
    from sglang.kernels.ops.attention import clamp_position, concat_mla, rope
    from sglang.kernels.ops.kvcache import hicache, kvcache, set_mla_kv_buffer
    from sglang.kernels.ops.layernorm import norm

    bf16, row = torch.bfloat16, 8 * 128 * 2  # bytes of an 8B model's keys of a token and layer
    builds: list[Callable[[], Any]] = [
        lambda: norm._jit_rmsnorm_module(4096, bf16),
        lambda: norm._jit_fused_add_rmsnorm_module(bf16, False),
        lambda: activation.activation_module(bf16),
        rope._jit_rotary_embedding_module,
        lambda: rope._jit_fused_rope_module(True, 128, bf16, bf16),
        lambda: rope._jit_fused_rope_module(True, 64, bf16, bf16),
        lambda: clamp_position._jit_clamp_position_module(torch.int64),
        concat_mla._jit_concat_mla_k_module,
        concat_mla._jit_concat_mla_absorb_q_module,
        lambda: kvcache.can_use_store_cache(row),
        lambda: set_mla_kv_buffer.set_mla_kv_buffer_module(1024, 128, True),
        lambda: hicache._jit_hicache_tma_module(block_quota=hicache.TMA_BLOCK_QUOTA),
        lambda: hicache._jit_hicache_module(  # where a page is no multiple of the other's chunks
            element_size=row,
            unroll=hicache._default_unroll(row),
            block_quota=hicache.DEFAULT_BLOCK_QUOTA,
        ),
    ]
    loader._load = _Copied(out)  # its tvm module would want a driver
    for build in builds:
        build()


class _Copied:
    """Stands where a module would be loaded: keeps it in `out`, by its name."""

    def __init__(self, out: Path) -> None:
        self._out = out

    def __call__(self, library: Path) -> None:
        self._out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library, self._out / library.name)
        print(f"  {library.stem}: {library.stat().st_size / 1e6:.1f} MB", flush=True)


def main(out: Path) -> None:
    sglang_kernels(out / "sglang")
    for name, build in flashinfer_kernels():
        _once(name, out / "flashinfer" / name / f"{name}.so", build)


def _once(name: str, target: Path, build: Build) -> None:
    if target.exists():
        return
    began = time.monotonic()
    build(target)
    size = target.stat().st_size / 1e6
    print(f"  {name}: {time.monotonic() - began:.0f} s, {size:.1f} MB", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
