"""Llama models from llama.cpp's GGUF format, back into the names and shapes Transformers uses."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tools.hf_folder import write_json, write_weights

_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(source: Path, folder: Path) -> None:
    """Writes config, generation config, tokenizer and bf16 weights of `source` into `folder`.

    Raises ValueError where the file is no Llama with a byte-level BPE tokenizer of the SmolLM kind.
    """
    reader = gguf.GGUFReader(source)
    _refuse_what_is_unknown(reader)
    write_json(folder / "config.json", model_config(reader))
    write_json(folder / "generation_config.json", generation_config(reader))
    write_tokenizer(reader, folder)
    write_weights(folder / "model.safetensors", weights(reader), "bfloat16")


def _refuse_what_is_unknown(reader: gguf.GGUFReader) -> None:
    expected = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
    }
    for key, value in expected.items():
        if (found := field(reader, key)) != value:
            raise ValueError(f"{key} is {found!r}; this converter knows only {value!r}")


def field(reader: gguf.GGUFReader, key: str) -> Any:
    """A metadata value. Raises ValueError if the file has none of that name."""
    found = reader.get_field(key)
    if found is None:
        raise ValueError(f"the GGUF file has no metadata {key!r}")
    return found.contents()


def model_config(reader: gguf.GGUFReader) -> dict[str, Any]:
    heads = field(reader, "llama.attention.head_count")
    hidden = field(reader, "llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": field(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field(reader, "llama.attention.head_count_kv"),
        "head_dim": hidden // heads,
        "vocab_size": field(reader, "llama.vocab_size"),
        "max_position_embeddings": field(reader, "llama.context_length"),
        "rope_theta": field(reader, "llama.rope.freq_base"),
        # The file holds the float32 nearest to 1e-05; the short decimal is what was meant.
        "rms_norm_eps": float(str(np.float32(field(reader, _EPSILON)))),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in {t.name for t in reader.tensors},
        "torch_dtype": "bfloat16",
        **_token_ids(reader),
    }


_EPSILON = "llama.attention.layer_norm_rms_epsilon"


def generation_config(reader: gguf.GGUFReader) -> dict[str, Any]:
    return {"_from_model_config": True, **_token_ids(reader)}


def _token_ids(reader: gguf.GGUFReader) -> dict[str, int]:
    return {
        "bos_token_id": field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": field(reader, "tokenizer.ggml.padding_token_id"),
    }


def weights(reader: gguf.GGUFReader) -> dict[str, np.ndarray]:
    """All tensors dequantised to float32, by their Transformers name."""
    heads = {
        "attn_q": field(reader, "llama.attention.head_count"),
        "attn_k": field(reader, "llama.attention.head_count_kv"),
    }
    result = {}
    for tensor in reader.tensors:
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            value = undo_rope_permutation(value, heads[kind])
        result[transformers_name(tensor.name)] = value
    return result


def transformers_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    match name.split("."):
        case ["blk", layer, kind, suffix] if kind in _LAYER:
            return f"model.layers.{layer}.{_LAYER[kind]}.{suffix}"
        case [kind, suffix] if kind in _TOP:
            return f"{_TOP[kind]}.{suffix}"
    raise ValueError(f"tensor {name!r} has no place in a Llama model")


def undo_rope_permutation(weight: np.ndarray, heads: int) -> np.ndarray:
    """[heads * head_dim, hidden], rows from llama.cpp's order to Transformers'.

    llama.cpp rotates neighbours (0,1), (2,3), ...; Transformers rotates halves (i, i + d/2).
    The inverse of `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py.
    """
    rows, hidden = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, hidden)
    return pairs.swapaxes(1, 2).reshape(rows, hidden)


def write_tokenizer(reader: gguf.GGUFReader, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json, with the chat template of the metadata."""
    tokens = field(reader, "tokenizer.ggml.tokens")
    tokenizer(reader).save(str(folder / "tokenizer.json"))
    names = {
        "bos_token": tokens[field(reader, "tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[field(reader, "tokenizer.ggml.eos_token_id")],
        "pad_token": tokens[field(reader, "tokenizer.ggml.padding_token_id")],
        "unk_token": tokens[field(reader, "tokenizer.ggml.unknown_token_id")],
    }
    config = {
        # GPT2Tokenizer would rebuild the pipeline and lose the splitting of digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": field(reader, "llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "chat_template": field(reader, "tokenizer.chat_template"),
        **names,
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", names)


def tokenizer(reader: gguf.GGUFReader) -> Tokenizer:
    """Byte-level BPE as SmolLM2 has it: every digit is a token of its own."""
    tokens = field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field(reader, "tokenizer.ggml.merges")]
    result = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    result.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    result.decoder = decoders.ByteLevel()
    kinds = field(reader, "tokenizer.ggml.token_type")
    result.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == gguf.TokenType.CONTROL
        ]
    )
    return result
