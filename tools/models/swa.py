"""Small Mellum models: every second layer attends a sliding window, MLPs are dense."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from tools.models import dense
from tools.models.recipe import Linear, Tensors


@dataclasses.dataclass(frozen=True)
class Recipe(dense.Recipe):
    """Heads are normalised, so that the gain that makes attention sharp is the norm's."""

    FAMILY: ClassVar[str] = "mellum"
    REVISION: ClassVar[int] = 1

    window: int = 64

    @property
    def layer_types(self) -> list[str]:
        kinds = ["sliding_attention", "full_attention"]
        return [kinds[layer % 2] for layer in range(self.layers)]

    def config(self, demo: dict[str, Any]) -> dict[str, Any]:
        """Mellum's, with the demo model's tokens."""
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        plain = {k: v for k, v in super().config(demo).items() if not k.startswith("rope_")}
        return {
            **plain,
            "architectures": ["MellumForCausalLM"],
            "model_type": "mellum",
            "sliding_window": self.window,
            "layer_types": self.layer_types,
            "mlp_layer_types": ["dense"] * self.layers,
            "num_experts": 0,
            "num_local_experts": 1,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": self.intermediate,
            "norm_topk_prob": True,
            "rope_parameters": {kind: rope for kind in sorted(set(self.layer_types))},
            "attention_bias": False,
        }

    def attention(self, linear: Linear) -> Tensors:
        """As `dense`, with norms of queries and keys."""
        yield from super().attention(linear)
        yield "q_norm", np.full(self.head_dim, 2.0, dtype=np.float32)
        yield "k_norm", np.full(self.head_dim, 2.0, dtype=np.float32)
