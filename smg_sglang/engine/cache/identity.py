"""Which servers may share KV pages: a digest of all that the content of a page depends on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")
_HEAD_BYTES = 1 << 20


def weights_digest(model_path: str, revision: str | None = None) -> str:
    """A digest of a local model folder: config, and name, size and head of each weight file.

    The head of a safetensors file holds the names, dtypes and shapes of its tensors and the start
    of their bytes; a fine-tuned model differs there. A path that is no local folder is named as is.
    """
    digest = hashlib.sha256()
    folder = Path(model_path)
    if not folder.is_dir():
        digest.update(f"{model_path}@{revision}".encode())
        return digest.hexdigest()[:32]
    config = folder / "config.json"
    if config.is_file():
        digest.update(config.read_bytes())
    for file in sorted(p for p in folder.iterdir() if p.suffix in _WEIGHT_SUFFIXES):
        digest.update(f"{file.name}:{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_HEAD_BYTES))
            # The middle tells apart fine-tunes that froze the first tensors.
            stream.seek(file.stat().st_size // 2)
            digest.update(stream.read(_HEAD_BYTES))
    return digest.hexdigest()[:32]


#: Arguments that change what a layer computes for the same tokens and weights.
_RESULT_FIELDS = (
    "dtype",
    "quantization",
    "kv_cache_dtype",
    "quantization_param_path",
    "json_model_override_args",
    "context_length",
    "load_format",
)


def model_identity(server_args: Any) -> str:
    """The `model` part of a namespace: weights, and the arguments that change their results.

    Two servers with equal identities compute the same KV for the same tokens (up to rounding).
    """
    chosen = {name: str(getattr(server_args, name, None)) for name in _RESULT_FIELDS}
    if str(server_args.load_format) == "dummy":
        # Random weights: nobody else has them.
        chosen["random_seed"] = str(server_args.random_seed)
    weights = weights_digest(server_args.model_path, server_args.revision)
    text = json.dumps({"weights": weights, **chosen}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
