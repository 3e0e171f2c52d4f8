import torch
from transformers import AutoModelForCausalLM

from tests.tools.far_end import assert_text_depends_on_the_far_end
from tools.models.mla import Recipe


def test_a_recipe_names_its_folder():
    assert Recipe().folder_name() == Recipe().folder_name()
    assert Recipe().folder_name() != Recipe(latent=128).folder_name()


def test_text_depends_on_the_far_end_of_the_prompt(tiny_mla):
    """Otherwise a wrong KV page would go unnoticed."""
    model, info = AutoModelForCausalLM.from_pretrained(
        tiny_mla, dtype=torch.float32, output_loading_info=True
    )
    assert type(model).__name__ == "DeepseekV2ForCausalLM"
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_text_depends_on_the_far_end(model, tiny_mla)
