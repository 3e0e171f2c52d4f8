"""Small traces on disk, in every format."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import pytest

DATA = Path(os.environ.get("SMG_TRACES", Path(__file__).parents[2] / "../shared/data"))
"""Where copies of the published traces are, if there are any."""


def published(name: str) -> Path:
    """A published trace; skips the test where there is no copy of it."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no copy of the published trace at {path}: set SMG_TRACES to their folder")
    return path


def mooncake(timestamp=0, input_length=1030, output_length=5, hash_ids=(0, 1, 2)):
    return {
        "timestamp": timestamp,
        "input_length": input_length,
        "output_length": output_length,
        "hash_ids": list(hash_ids),
    }


def bailian(chat_id=1, parent_chat_id=-1, timestamp=0.5, input_length=35, hash_ids=(7, 8, 9)):
    return {
        "chat_id": chat_id,
        "parent_chat_id": parent_chat_id,
        "timestamp": timestamp,
        "input_length": input_length,
        "output_length": 3,
        "type": "text",
        "turn": 1,
        "hash_ids": list(hash_ids),
    }


def call(t=0.0, tokens=130, hash_ids=(1, 2), out=9):
    return {"t": t, "type": "n", "in": tokens, "out": out, "hash_ids": list(hash_ids)}


def session(name, *calls):
    return {"id": name, "block_size": 64, "hash_id_scope": "local", "requests": list(calls)}


def write_lines(path: Path, *rows) -> Path:
    """A JSON document a line; gzip where the name says so."""
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_tar(path: Path, **documents) -> Path:
    """A packed archive with a member NAME.json for each, and a licence."""
    with tarfile.open(path, "w:gz") as archive:
        texts = {f"{name}.json": json.dumps(value) for name, value in documents.items()}
        for name, text in {"LICENSE": "Apache-2.0", **texts}.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return path
