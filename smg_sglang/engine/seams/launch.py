"""The memory server of a server that brings its own: started before the workers, stopped after."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from smg_sglang.box import GIB
from smg_sglang.engine.options.command_line import refuse
from smg_sglang.engine.options.record import carried, chosen, is_enabled
from smg_sglang.engine.options.refusals import refuse_model
from smg_sglang.errors import ConfigError

if TYPE_CHECKING:
    from smg_sglang.memory.process import MemoryProcess

logger = logging.getLogger(__name__)

#: The memory servers that this process started. SGLang's Engine is a class method away from any
#: instance when it launches its workers, so the handle cannot live on the instance.
_running: list[MemoryProcess] = []


@contextmanager
def _one_sentence(server_args: Any) -> Iterator[None]:
    """On a command line a refusal is one sentence and code 2, elsewhere a ConfigError."""
    try:
        yield
    except ConfigError as error:
        if carried(server_args)["origin"] == "cli":
            refuse(error)
        raise


def check_model(server_args: Any) -> None:
    """Refuse an unsupported model. Main process, before anything is started."""
    if is_enabled(server_args):
        with _one_sentence(server_args):
            refuse_model(server_args)


def prepare_split(server_args: Any) -> None:
    """Plan prefill and decode workers, where they were asked for. Main process only."""
    if not chosen(server_args).workers:
        return
    from smg_sglang.engine.split import launch as phase_launch

    with _one_sentence(server_args):
        phase_launch.prepare(server_args)


def start_memory(server_args: Any) -> None:
    """Start the embedded memory server, or name the one to attach to. Main process only.

    Writes the address into the record, which the workers receive pickled.
    """
    choice, config = carried(server_args), chosen(server_args)
    if not choice or "address" in choice:
        return
    if config.memory_address is not None:
        choice["address"] = config.memory_address
        logger.info("smg: attaching to the memory server at %s", config.memory_address)
        return
    from smg_sglang.memory.process import MemoryProcess

    assert config.host_gb is not None
    assert config.eviction_policy is not None
    assert config.hint_share is not None
    with _one_sentence(server_args):
        process = MemoryProcess.start(
            host_bytes=int(config.host_gb * GIB),
            eviction=config.eviction_policy,
            hint_share=config.hint_share,
            storage=config.storage,
            storage_config=config.storage_config,
        )
    _running.append(process)
    choice["address"] = process.address
    logger.info(
        "smg: %.2f GiB of host memory for KV pages, write policy %s, eviction policy %s, "
        "memory server at %s",
        config.host_gb,
        config.write_policy,
        config.eviction_policy,
        process.address,
    )


def retire_memory() -> None:
    """This process is about to kill its children: start none again, leave no files. Idempotent."""
    while _running:
        _running.pop().retire()
    if (split := sys.modules.get("smg_sglang.engine.split.launch")) is not None:
        split.retire()
