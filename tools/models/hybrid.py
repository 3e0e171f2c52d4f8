"""Small LFM2 models: every second layer is a short convolution, whose state is a few numbers of the
newest tokens and not keys and values."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from tools.models import dense
from tools.models.recipe import Linear, Tensors


@dataclasses.dataclass(frozen=True)
class Recipe(dense.Recipe):
    """Heads are normalised, so that the gain that makes attention sharp is the norm's."""

    FAMILY: ClassVar[str] = "lfm2"
    REVISION: ClassVar[int] = 1

    kernel: int = 4

    @property
    def layer_types(self) -> list[str]:
        return [["conv", "full_attention"][layer % 2] for layer in range(self.layers)]

    def config(self, demo: dict[str, Any]) -> dict[str, Any]:
        """LFM2's, with the demo model's tokens."""
        plain = {k: v for k, v in super().config(demo).items() if not k.startswith("rope_")}
        return {
            **plain,
            "architectures": ["Lfm2ForCausalLM"],
            "model_type": "lfm2",
            "layer_types": self.layer_types,
            "conv_L_cache": self.kernel,
            "conv_bias": False,
            "block_auto_adjust_ff_dim": False,
            "norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        }

    def tensors(self, vocab: int) -> Tensors:
        """Those of `dense` under LFM2's names, and convolutions for attention in every second
        layer."""
        rng = np.random.default_rng(self.seed + 1)

        def linear(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
            values = rng.standard_normal((rows, columns), dtype=np.float32)
            return values * np.float32(gain / columns**0.5)

        convolutions = [n for n, kind in enumerate(self.layer_types) if kind == "conv"]
        for name, values in super().tensors(vocab):
            if not any(name.startswith(f"model.layers.{n}.self_attn.") for n in convolutions):
                yield _lfm2_name(name), values
        for layer in convolutions:
            at = f"model.layers.{layer}.conv"
            yield f"{at}.in_proj.weight", linear(3 * self.hidden, self.hidden, gain=1.5)
            kernel = linear(self.hidden, self.kernel, gain=1.5)
            yield f"{at}.conv.weight", kernel.reshape(self.hidden, 1, self.kernel)
            yield f"{at}.out_proj.weight", linear(self.hidden, self.hidden, gain=2.0)

    def attention(self, linear: Linear) -> Tensors:
        """As `dense`, with norms of queries and keys."""
        yield from super().attention(linear)
        yield "q_layernorm", np.full(self.head_dim, 2.0, dtype=np.float32)
        yield "k_layernorm", np.full(self.head_dim, 2.0, dtype=np.float32)


_NAMES = {
    "input_layernorm": "operator_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "o_proj": "out_proj",
    "model.norm": "model.embedding_norm",
}


def _lfm2_name(name: str) -> str:
    for llama, lfm2 in _NAMES.items():
        name = name.replace(llama, lfm2)
    return name
