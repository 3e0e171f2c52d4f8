import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools.random_deepseek import Recipe


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
    tokenizer = AutoTokenizer.from_pretrained(tiny_mla)
    rest = " and then they all went home in the rain" * 8

    def continuation(start):
        prompt = tokenizer(start + rest, return_tensors="pt")
        return model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, -16:].tolist()

    one, other = continuation("One"), continuation("Two")
    assert one != other
    assert len(set(one)) > 4
