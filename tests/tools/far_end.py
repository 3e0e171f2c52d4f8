"""Random models are there so that a wrong KV page changes the text."""

from transformers import AutoTokenizer


def assert_text_depends_on_the_far_end(model, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rest = " and then they all went home in the rain" * 8

    def continuation(start):
        prompt = tokenizer(start + rest, return_tensors="pt")
        return model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, -16:].tolist()

    one, other = continuation("One"), continuation("Two")
    assert one != other
    assert len(set(one)) > 4
