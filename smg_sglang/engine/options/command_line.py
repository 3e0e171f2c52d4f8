"""Our flags on SGLang's command line, and as arguments of its Engine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from smg_sglang.config import OPTIONS, flags
from smg_sglang.engine.options.configuration import configure
from smg_sglang.errors import ConfigError

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    """Add our group to SGLang's parser. All flags exist also where the feature is off."""
    flags.add_flags(
        parser.add_argument_group(
            "smg: KV cache in host memory (smg_sglang)",
            "A prefix that leaves the device lives on in host memory and is loaded back when it is "
            "needed again.",
        )
    )


def configure_from_cli(server_args: ServerArgs, args: argparse.Namespace) -> None:
    """Apply the parsed flags; a wrong one ends the process with one sentence and code 2."""
    given = flags.from_namespace(args)
    if not getattr(args, "enable_smg", False):
        if given:
            refuse(ConfigError(f"{OPTIONS[next(iter(given))].flag} needs --enable-smg; add it."))
        return
    try:
        configure(server_args, given, origin="cli")
    except ConfigError as error:
        refuse(error)


def refuse(error: ConfigError) -> NoReturn:
    """End a command line with the one sentence that says what to change."""
    print(f"smg: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def split_kwargs(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Split Engine keyword arguments into SGLang's and ours (None where the flag is off).

    Raises:
        ConfigError: an unknown `smg_*` name, or one without `enable_smg`.
    """
    ours = {k: v for k, v in kwargs.items() if k.startswith("smg_")}
    theirs = {k: v for k, v in kwargs.items() if k not in ours}
    enabled = theirs.pop("enable_smg", False)
    given = flags.from_keywords(ours)
    if ours and not enabled:
        raise ConfigError(f"{min(ours)} needs enable_smg=True; add it.")
    return theirs, given if enabled else None
