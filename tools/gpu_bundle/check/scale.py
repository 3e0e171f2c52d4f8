"""How large everything is: on an H100, and in a dry run on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tools.models import RECIPES, dense
from tools.models.recipe import model_without_weights, random_model


@dataclass(frozen=True)
class Scale:
    """Tokens, unless it says otherwise.

    Attributes:
        server_args: more flags of all servers.
        pool: of each server; working sets are multiples of it.
        stretch: limits of all steps are multiplied by it.
    """

    dtype: str
    server_args: str
    host_gb: float
    pool: int
    prefix: int
    document: int
    documents: int
    chats: int
    concurrency: int
    unshared: int
    context: int
    context_pool: int
    long_prompt: int
    on_gpu: bool
    stretch: float = 1.0


H100 = Scale(
    dtype="bfloat16",
    server_args="--load-format dummy --attention-backend flashinfer --mem-fraction-static 0.9"
    " --cuda-graph-max-bs-decode 16",
    host_gb=24.0,
    pool=40960,
    prefix=8192,
    document=4096,
    documents=24,
    chats=36,
    concurrency=8,
    unshared=2048,
    context=98304,
    context_pool=12288,
    long_prompt=8192,
    on_gpu=True,
)
DRY = Scale(
    dtype="float32",
    server_args="--chunked-prefill-size 512",
    host_gb=0.25,
    pool=2048,
    prefix=512,
    document=256,
    documents=12,
    chats=12,
    concurrency=2,
    unshared=128,
    context=2048,
    context_pool=512,
    long_prompt=512,
    on_gpu=False,
    stretch=8.0,
)
EIGHT_B = {"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128}
EIGHT_B |= {"intermediate": 14336}
ONE_B = {"layers": 16, "hidden": 2048, "heads": 32, "kv_heads": 8, "head_dim": 64}
ONE_B |= {"intermediate": 8192}


def model(scale: Scale) -> Path:
    """Of Llama-3.1-8B's shape, without weights; the tiny one in a dry run."""
    if not scale.on_gpu:
        return random_model(RECIPES["dense"])
    return model_without_weights(dense.Recipe("bfloat16", context=131072, **EIGHT_B))


def small_model(scale: Scale) -> Path:
    """Of Llama-3.2-1B's: four workers of it fit one device."""
    if not scale.on_gpu:
        return random_model(RECIPES["dense"])
    return model_without_weights(dense.Recipe("bfloat16", context=131072, **ONE_B))
