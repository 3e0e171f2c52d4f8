"""Small Llama models with seeded random weights and the demo tokenizer: exact tests in a second."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tools.demo_model import demo_model
from tools.hf_folder import ensure_folder, write_json, write_weights

REVISION = 1  # raise it when the same recipe gives other files than before


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What determines a random model; its hash is part of the folder's name."""

    dtype: str = "float32"  # or "bfloat16": the same numbers, rounded
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 256
    context: int = 8192
    seed: int = 0

    def folder_name(self) -> str:
        text = json.dumps([REVISION, dataclasses.asdict(self)], sort_keys=True)
        return f"random-llama-{self.dtype}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def random_llama(recipe: Recipe | None = None) -> Path:
    """The model folder of `recipe`, made on the first call on this machine."""
    recipe = recipe or Recipe()
    return ensure_folder(recipe.folder_name(), lambda folder: _build(recipe, folder))


def llama_without_weights(recipe: Recipe) -> Path:
    """A model folder of that shape for `--load-format dummy`, where only speed matters."""
    config = _config(recipe, demo_config())
    name = f"shape-of-{recipe.folder_name()}"
    return ensure_folder(name, lambda folder: write_config(folder, config))


def _build(recipe: Recipe, folder: Path) -> None:
    config = _config(recipe, demo_config())
    write_model(folder, config, _tensors(recipe, config["vocab_size"]), recipe.dtype)


def demo_config() -> dict[str, Any]:
    """Of the model whose tokenizer random models have."""
    config: dict[str, Any] = json.loads((demo_model() / "config.json").read_text(encoding="utf-8"))
    return config


def write_model(
    folder: Path, config: dict[str, Any], tensors: Iterator[tuple[str, np.ndarray]], dtype: str
) -> None:
    """A model folder with these weights and the demo tokenizer."""
    write_config(folder, config)
    write_weights(folder / "model.safetensors", dict(tensors), dtype)


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """All of a model folder but its weights, with the demo tokenizer."""
    demo = demo_model()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(demo / name, folder / name)
    shutil.copyfile(demo / "generation_config.json", folder / "generation_config.json")
    write_json(folder / "config.json", config)


def make_linear(seed: int) -> tuple[np.random.Generator, Callable[..., np.ndarray]]:
    """Numbers in the order they are asked for, and matrices of them that keep activations near 1,
    times a gain."""
    rng = np.random.default_rng(seed)

    def linear(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        values = rng.standard_normal((rows, columns), dtype=np.float32)
        return values * np.float32(gain / columns**0.5)

    return rng, linear


def _config(recipe: Recipe, demo: dict[str, Any]) -> dict[str, Any]:
    return {
        **demo,
        "hidden_size": recipe.hidden,
        "intermediate_size": recipe.intermediate,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.kv_heads,
        "head_dim": recipe.head_dim,
        "max_position_embeddings": recipe.context,
        "tie_word_embeddings": False,
        "torch_dtype": recipe.dtype,
    }


def _tensors(recipe: Recipe, vocab: int) -> Iterator[tuple[str, np.ndarray]]:
    """Names and float32 values, always drawn in the same order.

    Scaled so that activations stay near 1 and attention is sharp (the gain on q and k): a wrong
    KV row then changes the text, which is what these models are for.
    """
    rng, linear = make_linear(recipe.seed)
    hidden, query = recipe.hidden, recipe.heads * recipe.head_dim
    key_value = recipe.kv_heads * recipe.head_dim
    norm = np.ones(hidden, dtype=np.float32)
    yield "model.embed_tokens.weight", rng.standard_normal((vocab, hidden), dtype=np.float32)
    for layer in range(recipe.layers):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", norm
        yield f"{at}.self_attn.q_proj.weight", linear(query, hidden, gain=1.5)
        yield f"{at}.self_attn.k_proj.weight", linear(key_value, hidden, gain=1.5)
        yield f"{at}.self_attn.v_proj.weight", linear(key_value, hidden)
        yield f"{at}.self_attn.o_proj.weight", linear(hidden, query, gain=2.0)
        yield f"{at}.post_attention_layernorm.weight", norm
        yield f"{at}.mlp.gate_proj.weight", linear(recipe.intermediate, hidden)
        yield f"{at}.mlp.up_proj.weight", linear(recipe.intermediate, hidden)
        yield f"{at}.mlp.down_proj.weight", linear(hidden, recipe.intermediate)
    yield "model.norm.weight", norm
    yield "lm_head.weight", linear(vocab, hidden)
