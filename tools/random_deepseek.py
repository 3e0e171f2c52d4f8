"""Small DeepSeek-V2 models with seeded random weights and the demo tokenizer: latent attention
(MLA) without experts."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tools.hf_folder import ensure_folder
from tools.random_llama import demo_config, make_linear, write_model

REVISION = 1  # raise it when the same recipe gives other files than before


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What determines a random model; its hash is part of the folder's name.

    The widths of its heads and latents are DeepSeek's own, for which kernels are made.
    """

    dtype: str = "bfloat16"  # or "float32": the same numbers
    layers: int = 4
    hidden: int = 128
    heads: int = 16
    latent: int = 512
    rope: int = 64
    nope: int = 128
    value: int = 128
    intermediate: int = 256
    context: int = 8192
    seed: int = 0

    def folder_name(self) -> str:
        text = json.dumps([REVISION, dataclasses.asdict(self)], sort_keys=True)
        return f"random-deepseek-{self.dtype}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def random_deepseek(recipe: Recipe | None = None) -> Path:
    """The model folder of `recipe`, made on the first call on this machine."""
    recipe = recipe or Recipe()
    return ensure_folder(recipe.folder_name(), lambda folder: _build(recipe, folder))


def _build(recipe: Recipe, folder: Path) -> None:
    config = _config(recipe, demo_config())
    write_model(folder, config, _tensors(recipe, config["vocab_size"]), recipe.dtype)


def _config(recipe: Recipe, demo: dict[str, Any]) -> dict[str, Any]:
    tokens = {name: demo[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    no_experts: dict[str, Any] = {"first_k_dense_replace": recipe.layers, "n_routed_experts": 2}
    no_experts |= {"n_shared_experts": 1, "num_experts_per_tok": 1, "moe_layer_freq": 1}
    no_experts |= {"moe_intermediate_size": recipe.intermediate, "routed_scaling_factor": 1.0}
    no_experts |= {"n_group": 1, "topk_group": 1, "topk_method": "greedy"}
    no_experts |= {"scoring_func": "softmax", "norm_topk_prob": False}
    return {
        **tokens,
        **no_experts,
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "hidden_size": recipe.hidden,
        "intermediate_size": recipe.intermediate,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.heads,
        "q_lora_rank": None,
        "kv_lora_rank": recipe.latent,
        "qk_rope_head_dim": recipe.rope,
        "qk_nope_head_dim": recipe.nope,
        "v_head_dim": recipe.value,
        "max_position_embeddings": recipe.context,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": recipe.dtype,
    }


def _tensors(recipe: Recipe, vocab: int) -> Iterator[tuple[str, np.ndarray]]:
    """Names and float32 values, always drawn in the same order; as sharp as `random_llama`'s."""
    rng, linear = make_linear(recipe.seed)
    hidden, heads = recipe.hidden, recipe.heads
    norm = np.ones(hidden, dtype=np.float32)
    yield "model.embed_tokens.weight", rng.standard_normal((vocab, hidden), dtype=np.float32)
    for layer in range(recipe.layers):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", norm
        query = heads * (recipe.nope + recipe.rope)
        yield f"{at}.self_attn.q_proj.weight", linear(query, hidden, gain=1.5)
        latent = linear(recipe.latent + recipe.rope, hidden, gain=1.5)
        yield f"{at}.self_attn.kv_a_proj_with_mqa.weight", latent
        yield f"{at}.self_attn.kv_a_layernorm.weight", np.ones(recipe.latent, dtype=np.float32)
        expanded = heads * (recipe.nope + recipe.value)
        yield f"{at}.self_attn.kv_b_proj.weight", linear(expanded, recipe.latent)
        out = linear(hidden, heads * recipe.value, gain=2.0)
        yield f"{at}.self_attn.o_proj.weight", out
        yield f"{at}.post_attention_layernorm.weight", norm
        yield f"{at}.mlp.gate_proj.weight", linear(recipe.intermediate, hidden)
        yield f"{at}.mlp.up_proj.weight", linear(recipe.intermediate, hidden)
        yield f"{at}.mlp.down_proj.weight", linear(hidden, recipe.intermediate)
    yield "model.norm.weight", norm
    yield "lm_head.weight", linear(vocab, hidden)
