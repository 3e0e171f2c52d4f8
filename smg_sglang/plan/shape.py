"""What one token of decode reads and computes, by the model's shape."""

from __future__ import annotations

from dataclasses import dataclass

from smg_sglang.errors import ConfigError
from smg_sglang.simulate.model import config_cost, model_config


@dataclass(frozen=True)
class DecodeShape:
    """Of a model, in the dtype it is served in.

    Attributes:
        weight_bytes: that must be somewhere.
        active_bytes: of these, what one step reads (fewer of a mixture of experts, for one token).
        kv_bytes: of one token of context, all layers.
        attention_flops: of one new token, for each token of context, all layers.
        layers: each of which has attention once.
    """

    name: str
    weight_bytes: float
    active_bytes: float
    kv_bytes: float
    attention_flops: float
    layers: int


def _latent(name: str, *, total: float, active: float, layers: int, heads: int) -> DecodeShape:
    """DeepSeek's MLA: a latent of 512 and 64 rotated numbers a token and layer, in bf16, which all
    heads read: for scores 576 products a head, for the output 512."""
    return DecodeShape(
        name=name,
        weight_bytes=2 * total,
        active_bytes=2 * active,
        kv_bytes=2.0 * layers * (512 + 64),
        attention_flops=2.0 * layers * heads * (576 + 512),
        layers=layers,
    )


#: Parameters as their model cards say, in bf16.
LATENT = {
    "deepseek-v2-lite": _latent(
        "deepseek-v2-lite", total=15.7e9, active=2.4e9, layers=27, heads=16
    ),
    "deepseek-v3": _latent("deepseek-v3", total=671e9, active=37e9, layers=61, heads=128),
}


def decode_shape(name: str) -> DecodeShape:
    """Of a known model, or of a dense one's `config.json` given by its path or its folder's.

    Raises:
        ConfigError: one sentence that says which names there are.
    """
    if name in LATENT:
        return LATENT[name]
    name, config = model_config(name, *LATENT)
    cost = config_cost(name, config)
    if config.vocab_size is None:
        raise ConfigError(f"{name} does not describe a model known here: it has no vocab_size.")
    # The logits' matrix is read at each step; the embedding, where it is another one, is not.
    numbers = cost.linear_flops / 2 + config.vocab_size * config.hidden_size
    return DecodeShape(
        name=cost.name,
        weight_bytes=config.element_bytes * numbers,
        active_bytes=config.element_bytes * numbers,
        kv_bytes=cost.kv_bytes,
        attention_flops=cost.attention_flops,
        layers=config.num_hidden_layers,
    )
