"""What a model's tokens cost: bytes of KV, and FLOPs to compute."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from smg_sglang.errors import ConfigError

_DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, None: 2}


@dataclass(frozen=True)
class ModelCost:
    """A dense transformer with grouped-query attention.

    Attributes:
        linear_flops: of one token, all matrix products but attention's (and the last layer's
            logits, which a prompt needs for its last token only).
        attention_flops: of one token for each token before it.
        kv_bytes: of one token, all layers, all ranks.
    """

    name: str
    kv_bytes: int
    linear_flops: float
    attention_flops: float

    def prefill_flops(self, start: int, end: int) -> float:
        """To compute tokens start..end of a prompt of which the ones before are cached."""
        tokens = end - start
        return tokens * (self.linear_flops + self.attention_flops * (start + end) / 2)


class HfConfig(msgspec.Struct, frozen=True):
    """The fields of a `config.json` that decide the cost."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_hidden_layers: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    torch_dtype: str | None = None
    dtype: str | None = None
    vocab_size: int | None = None
    kv_lora_rank: int | None = None
    num_experts: int | None = None
    num_local_experts: int | None = None
    n_routed_experts: int | None = None

    @property
    def element_bytes(self) -> int:
        """Of a weight, and of a number of KV."""
        return _DTYPE_BYTES[self.torch_dtype or self.dtype]


#: From the models' published `config.json`.
MODELS = {
    "llama-3.1-8b": HfConfig(4096, 14336, 32, 32, 8, 128, "bfloat16", vocab_size=128256),
    "qwen2.5-7b": HfConfig(3584, 18944, 28, 28, 4, 128, "bfloat16", vocab_size=152064),
    "smollm2-135m": HfConfig(576, 1536, 9, 30, 3, 64, "bfloat16", vocab_size=49152),
}


def model_cost(name: str) -> ModelCost:
    """Of a model that `model_config` knows. Raises ConfigError, too, for what is not dense."""
    return config_cost(*model_config(name))


def model_config(name: str, *others: str) -> tuple[str, HfConfig]:
    """(name, shape) of a known model, or of a `config.json` given by its path or its folder's.

    Raises ConfigError that says which names there are; `others` are the caller's own.
    """
    if name in MODELS:
        return name, MODELS[name]
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    try:
        config = msgspec.json.decode(path.read_bytes(), type=HfConfig)
    except OSError:
        known = ", ".join([*MODELS, *others])
        raise ConfigError(
            f"--model must be one of {known}, or the path of a config.json, not {name!r}."
        ) from None
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path} does not describe a model known here: {error}.") from None
    return path.parent.name or name, config


def config_cost(name: str, config: HfConfig) -> ModelCost:
    """Of a model of that shape. Raises ConfigError for what is not dense, or of a strange dtype."""
    experts = config.num_experts or config.num_local_experts or config.n_routed_experts
    if config.kv_lora_rank or experts:
        raise ConfigError(f"{name}: only dense models with plain KV are known here, no MLA or MoE.")
    heads, layers, hidden = (
        config.num_attention_heads,
        config.num_hidden_layers,
        config.hidden_size,
    )
    dim = config.head_dim or hidden // heads
    kv_heads = config.num_key_value_heads or heads
    if (dtype := config.torch_dtype or config.dtype) not in _DTYPE_BYTES:
        raise ConfigError(f"{name}: the dtype {dtype!r} is not known here.")
    weights = hidden * dim * (2 * heads + 2 * kv_heads) + 3 * hidden * config.intermediate_size
    return ModelCost(
        name=name,
        kv_bytes=2 * layers * kv_heads * dim * config.element_bytes,
        linear_flops=2.0 * layers * weights,
        attention_flops=4.0 * layers * heads * dim,
    )
