"""The declared choices as flags, variables, arguments and a table."""

from __future__ import annotations

import os
from argparse import _ActionsContainer
from collections.abc import Iterator, Mapping
from typing import Any

from smg_sglang.config.choices import OPTIONS
from smg_sglang.config.option import Option
from smg_sglang.config.policies import DEFAULT_EVICTION, DEFAULT_HINT_SHARE
from smg_sglang.errors import ConfigError

ENABLE = "--enable-smg"
ENABLE_TEXT = "Keep prefixes in host memory"


def add_flags(group: _ActionsContainer) -> None:
    """Add every flag to a command line. None is what each has where it is not given."""
    group.add_argument(ENABLE, action="store_true", help=f"{ENABLE_TEXT}. (default: off)")
    for option in OPTIONS.values():
        _add(group, option.flag, option, None, option.default)


def add_memory_flags(group: _ActionsContainer, host_gb: float) -> None:
    """Add those that shape a memory server, without our prefix; `host_gb` is its default size."""
    defaults = {
        "host_gb": (host_gb, f"half of what is free, now {host_gb:g}"),
        "eviction_policy": (DEFAULT_EVICTION.value, DEFAULT_EVICTION.value),
        "hint_share": (DEFAULT_HINT_SHARE, f"{DEFAULT_HINT_SHARE:g}"),
    }
    for field, option in OPTIONS.items():
        if option.memory:
            flag = "--" + option.flag.removeprefix("--smg-")
            _add(group, flag, option, *defaults.get(field, (None, option.default)))


def _add(group: _ActionsContainer, flag: str, option: Option, default: Any, told: str) -> None:
    help = f"{option.text}. (default: {told})".replace("%", "%%")
    if option.type is bool:
        group.add_argument(flag, action="store_true", default=default, help=help)
        return
    group.add_argument(
        flag,
        type=option.type if option.type in (int, float) else str,
        choices=option.choices,
        default=default,
        metavar=option.metavar,
        help=help,
    )


def from_namespace(parsed: object) -> dict[str, Any]:
    """What was given on a command line, by field of `SmgConfig`."""
    found = {field: getattr(parsed, f"smg_{o.name}", None) for field, o in OPTIONS.items()}
    return {field: value for field, value in found.items() if value is not None}


def from_keywords(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments `smg_*`, by field.

    Raises:
        ConfigError: there is no such argument.
    """
    fields = {f"smg_{option.name}": field for field, option in OPTIONS.items()}
    unknown = sorted(given.keys() - fields.keys())
    if unknown:
        raise ConfigError(f"unknown argument {unknown[0]!r}; there are: {', '.join(fields)}.")
    return {fields[name]: value for name, value in given.items() if value is not None}


def from_environment() -> dict[str, Any] | None:
    """What SMG_* variables choose, for programs that build SGLang's Engine; by field.

    None unless SMG_ENABLE is 1.
    """
    if os.environ.get("SMG_ENABLE", "0").lower() not in ("1", "true"):
        return None
    return {
        field: option.read(os.environ[option.variable], option.variable)
        for field, option in OPTIONS.items()
        if os.environ.get(option.variable)
    }


def table() -> Iterator[str]:
    """The lines of a table in Markdown, one a flag."""
    yield "| flag | default | meaning |"
    yield "|---|---|---|"
    yield f"| `{ENABLE}` | off | {ENABLE_TEXT} |"
    for option in OPTIONS.values():
        value = f" {option.metavar or 'NAME'}" if option.type is not bool else ""
        yield f"| `{option.flag}{value}` | {option.default} | {option.text} |"
