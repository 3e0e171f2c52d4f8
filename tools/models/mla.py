"""Small DeepSeek-V2 models with seeded random weights and the demo tokenizer: latent attention
(MLA) without experts. Positions are scaled as in DeepSeek's own: SGLang 0.5.23 has no others for
its latent attention on a CPU (`layers/rotary_embedding/factory.py`, `get_rope_cpu`)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from tools.models import recipe
from tools.models.recipe import Linear, Tensors


@dataclasses.dataclass(frozen=True)
class Recipe(recipe.Recipe):
    """The widths of its heads and latents are DeepSeek's own, for which kernels are made."""

    FAMILY: ClassVar[str] = "deepseek"
    REVISION: ClassVar[int] = 2

    dtype: str = "bfloat16"  # or "float32": the same numbers
    heads: int = 16
    latent: int = 512
    rope: int = 64
    nope: int = 128
    value: int = 128

    def config(self, demo: dict[str, Any]) -> dict[str, Any]:
        """DeepSeek-V2's, with the demo model's tokens."""
        tokens = {name: demo[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
        no_experts: dict[str, Any] = {"first_k_dense_replace": self.layers, "n_routed_experts": 2}
        no_experts |= {"n_shared_experts": 1, "num_experts_per_tok": 1, "moe_layer_freq": 1}
        no_experts |= {"moe_intermediate_size": self.intermediate, "routed_scaling_factor": 1.0}
        no_experts |= {"n_group": 1, "topk_group": 1, "topk_method": "greedy"}
        no_experts |= {"scoring_func": "softmax", "norm_topk_prob": False}
        scaling: dict[str, Any] = {"type": "yarn", "factor": 2.0, "beta_fast": 32, "beta_slow": 1}
        scaling |= {"original_max_position_embeddings": self.context // 2}
        scaling |= {"mscale": 0.707, "mscale_all_dim": 0.707}
        return {
            **tokens,
            **no_experts,
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "q_lora_rank": None,
            "kv_lora_rank": self.latent,
            "qk_rope_head_dim": self.rope,
            "qk_nope_head_dim": self.nope,
            "v_head_dim": self.value,
            "max_position_embeddings": self.context,
            "rope_theta": 10000.0,
            "rope_scaling": scaling,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": False,
            "torch_dtype": self.dtype,
        }

    def attention(self, linear: Linear) -> Tensors:
        """As sharp as `dense`'s."""
        yield "q_proj", linear(self.heads * (self.nope + self.rope), self.hidden, gain=1.5)
        latent = linear(self.latent + self.rope, self.hidden, gain=1.5)
        yield "kv_a_proj_with_mqa", latent
        yield "kv_a_layernorm", np.ones(self.latent, dtype=np.float32)
        yield "kv_b_proj", linear(self.heads * (self.nope + self.value), self.latent)
        yield "o_proj", linear(self.hidden, self.heads * self.value, gain=2.0)
