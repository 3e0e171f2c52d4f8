"""Small Llama models with seeded random weights and the demo tokenizer: exact tests in a second."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from tools.models import recipe
from tools.models.recipe import Linear, Tensors


@dataclasses.dataclass(frozen=True)
class Recipe(recipe.Recipe):
    """Attention of keys and values (GQA)."""

    FAMILY: ClassVar[str] = "llama"
    REVISION: ClassVar[int] = 1

    kv_heads: int = 2
    head_dim: int = 64

    def config(self, demo: dict[str, Any]) -> dict[str, Any]:
        """The demo model's, in another shape."""
        return {
            **demo,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.context,
            "tie_word_embeddings": False,
            "torch_dtype": self.dtype,
        }

    def attention(self, linear: Linear) -> Tensors:
        """Scaled so that attention is sharp (the gain on q and k): a wrong KV row then changes the
        text, which is what these models are for."""
        query, key_value = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "q_proj", linear(query, self.hidden, gain=1.5)
        yield "k_proj", linear(key_value, self.hidden, gain=1.5)
        yield "v_proj", linear(key_value, self.hidden)
        yield "o_proj", linear(self.hidden, query, gain=2.0)
