"""What is said of storage, checked before anything starts."""

from __future__ import annotations

import json
import os
import tempfile
from typing import Any

from smg_sglang.config.policies import StorageName
from smg_sglang.errors import ConfigError

#: SGLang's own variable for its file backend, which goes before the configuration.
DIRECTORY_VARIABLE = "SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"
#: What SGLang's factory wants to know of a dynamic backend.
DYNAMIC = ("backend_name", "module_path", "class_name")
#: Bytes of the file system that SGLang's file backend leaves free, unless it is told otherwise: a
#: full disk harms others too.
MIN_FREE_SPACE = "1G"
#: Of Mooncake, unless the configuration says otherwise: no etcd, no RDMA, and of this machine's
#: memory as much for the store as one server's files would take.
MOONCAKE = {"metadata_server": "P2PHANDSHAKE", "protocol": "tcp", "global_segment_size": "4gb"}


def storage_settings(name: str, text: str | None) -> dict[str, Any]:
    """What SGLang's backend of that name is given as its `extra_config`.

    Raises:
        ConfigError: one sentence that says what to change.
    """
    if name not in list(StorageName):
        raise ConfigError(f"--smg-storage must be one of {', '.join(StorageName)}, not {name!r}.")
    settings = _parsed(text)
    if name == StorageName.DYNAMIC:
        missing = [key for key in DYNAMIC if not isinstance(settings.get(key), str)]
        if missing:
            raise ConfigError(
                f"--smg-storage dynamic needs {', '.join(missing)} in --smg-storage-config: the "
                "class of a backend, and its module."
            )
        return settings
    if name == StorageName.MOONCAKE:
        if not isinstance(settings.get("master_server_address"), str):
            raise ConfigError(
                "--smg-storage mooncake needs the address of a mooncake_master: give "
                '--smg-storage-config \'{"master_server_address": "HOST:50051", '
                '"local_hostname": "THIS_HOST", "global_segment_size": "64gb"}\'.'
            )
        return {**MOONCAKE, **settings}
    directory = os.environ.get(DIRECTORY_VARIABLE) or settings.get("file_storage_path")
    if not isinstance(directory, str) or not os.path.isabs(directory):
        raise ConfigError(
            "--smg-storage file needs a directory: give --smg-storage-config "
            '\'{"file_storage_path": "/DIRECTORY", "max_size": "100G"}\'.'
        )
    _check_directory(directory)
    return {"min_free_space": MIN_FREE_SPACE, **settings}


def _parsed(text: str | None) -> dict[str, Any]:
    try:
        settings = json.loads(text or "{}")
    except ValueError as error:
        raise ConfigError(f"--smg-storage-config is no JSON: {error}.") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"--smg-storage-config must be a JSON object, not {text}.")
    return settings


def _check_directory(directory: str) -> None:
    """Make it, and see that files can be made in it."""
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ConfigError(
            f"--smg-storage file cannot write to {directory}: {error.strerror}."
        ) from error
