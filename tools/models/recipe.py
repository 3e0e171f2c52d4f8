"""What the random models have in common: a recipe that names its folder, and all weights but those
of attention. The tokenizer is the demo model's."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tools.demo_model import demo_model
from tools.hf_folder import ensure_folder, write_json, write_weights

Tensors = Iterator[tuple[str, np.ndarray]]
#: rows, columns, and `gain=`: a matrix that keeps activations near 1, times the gain.
Linear = Callable[..., np.ndarray]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What determines a random model; its hash is part of the folder's name."""

    FAMILY: ClassVar[str]
    #: Raised when the same recipe gives other files than before.
    REVISION: ClassVar[int]

    dtype: str = "float32"  # or "bfloat16": the same numbers, rounded
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    intermediate: int = 256
    context: int = 8192
    seed: int = 0

    def folder_name(self) -> str:
        text = json.dumps([self.REVISION, dataclasses.asdict(self)], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return f"random-{self.FAMILY}-{self.dtype}-{digest}"

    def config(self, demo: dict[str, Any]) -> dict[str, Any]:
        """The model's config.json; `demo` is that of the model whose tokenizer it has."""
        raise NotImplementedError

    def attention(self, linear: Linear) -> Tensors:
        """A layer's weights of attention, by name below `self_attn`."""
        raise NotImplementedError

    def mlp(self, layer: int, linear: Linear) -> Tensors:
        """A layer's weights of what comes after attention, by name below `mlp`."""
        yield "gate_proj", linear(self.intermediate, self.hidden)
        yield "up_proj", linear(self.intermediate, self.hidden)
        yield "down_proj", linear(self.hidden, self.intermediate)

    def tensors(self, vocab: int) -> Tensors:
        """Names and float32 values, always drawn in the same order."""
        rng = np.random.default_rng(self.seed)

        def linear(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
            values = rng.standard_normal((rows, columns), dtype=np.float32)
            return values * np.float32(gain / columns**0.5)

        hidden, norm = self.hidden, np.ones(self.hidden, dtype=np.float32)
        yield "model.embed_tokens.weight", rng.standard_normal((vocab, hidden), dtype=np.float32)
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            yield f"{at}.input_layernorm.weight", norm
            for name, values in self.attention(linear):
                yield f"{at}.self_attn.{name}.weight", values
            yield f"{at}.post_attention_layernorm.weight", norm
            for name, values in self.mlp(layer, linear):
                yield f"{at}.mlp.{name}.weight", values
        yield "model.norm.weight", norm
        yield "lm_head.weight", linear(vocab, hidden)


def random_model(recipe: Recipe) -> Path:
    """The model folder of `recipe`, made on the first call on this machine."""

    def build(folder: Path) -> None:
        config = _write_config(recipe, folder)
        tensors = dict(recipe.tensors(config["vocab_size"]))
        write_weights(folder / "model.safetensors", tensors, recipe.dtype)

    return ensure_folder(recipe.folder_name(), build)


def model_without_weights(recipe: Recipe) -> Path:
    """A model folder of that shape for `--load-format dummy`, where only speed matters."""

    def build(folder: Path) -> None:
        _write_config(recipe, folder)

    return ensure_folder(f"shape-of-{recipe.folder_name()}", build)


def _write_config(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """All of a model folder but its weights; the config."""
    demo = demo_model()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(demo / name, folder / name)
    shutil.copyfile(demo / "generation_config.json", folder / "generation_config.json")
    config = recipe.config(json.loads((demo / "config.json").read_text(encoding="utf-8")))
    write_json(folder / "config.json", config)
    return config
