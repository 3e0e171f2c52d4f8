import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.tools.far_end import assert_text_depends_on_the_far_end
from tools.models.dense import Recipe


def test_a_recipe_names_its_folder():
    assert Recipe().folder_name() == Recipe().folder_name()
    assert Recipe().folder_name() != Recipe(seed=1).folder_name()


def test_both_dtypes_hold_the_same_numbers(tiny_model, tiny_model_bf16):
    exact = load_file(tiny_model / "model.safetensors")
    rounded = load_file(tiny_model_bf16 / "model.safetensors")
    assert exact.keys() == rounded.keys()
    name = "model.layers.3.self_attn.k_proj.weight"
    assert torch.equal(exact[name].bfloat16(), rounded[name])


def test_text_depends_on_the_far_end_of_the_prompt(tiny_model):
    """Otherwise a wrong KV page would go unnoticed."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert_text_depends_on_the_far_end(model, tiny_model)
