"""What is declared of a choice beside its name and type."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import StrEnum
from types import UnionType
from typing import Any, get_args, get_type_hints

import msgspec

from smg_sglang.errors import ConfigError


@dataclass(frozen=True)
class Option:
    """What a field of `SmgConfig` is to people.

    Attributes:
        name: behind `--smg-`, `SMG_` and `smg_`, spelled as those are.
        type: of its value; an enum's members are the only choices, a bool is a switch.
        text: what it chooses; a sentence without its full stop.
        default: the default in words.
        metavar: what stands for its value.
        above, least, most: bounds of a number, in `unit`.
        memory: whether it shapes the memory server, so that `python -m smg_sglang memory` has it.
        split: whether it means nothing without prefill and decode workers.
    """

    name: str
    type: Any
    text: str
    default: str
    metavar: str | None = None
    above: float | None = None
    least: float | None = None
    most: float | None = None
    unit: str = ""
    memory: bool = False
    split: bool = False

    @property
    def flag(self) -> str:
        return "--smg-" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return f"SMG_{self.name.upper()}"

    @property
    def choices(self) -> list[str] | None:
        is_enum = isinstance(self.type, type) and issubclass(self.type, StrEnum)
        return [choice.value for choice in self.type] if is_enum else None

    def read(self, value: Any, called: str | None = None) -> Any:
        """The value as its type, from a text where it is one.

        Raises:
            ConfigError: it is none, or out of bounds; called by its flag, or as `called` says.
        """
        called = called or self.flag
        try:
            if isinstance(value, str) and self.type in (int, float):
                value = self.type(value)
            value = msgspec.convert(value, self.type, strict=False)
        except ValueError:  # msgspec's are, too
            raise ConfigError(f"{called} must be {self._kind()}, not {value!r}.") from None
        if not self._is_within(value):
            unit = f" {self.unit}" if self.unit else ""
            raise ConfigError(f"{called} must be {self._bounds()}{unit}, not {value:g}.")
        return value

    def _kind(self) -> str:
        if self.choices is not None:
            return f"one of {', '.join(self.choices)}"
        return {int: "a whole number", float: "a number", bool: "0 or 1"}.get(self.type, "a text")

    def _is_within(self, value: Any) -> bool:
        """NaN is not."""
        return (
            (self.above is None or value > self.above)
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
        )

    def _bounds(self) -> str:
        bounds = {"above": self.above, "at least": self.least, "at most": self.most}
        return " and ".join(f"{word} {x:g}" for word, x in bounds.items() if x is not None)


def option(
    value: Any, text: str, default: str | None = None, name: str | None = None, **more: Any
) -> Any:
    """A field of that default; `default` says it in words where the value itself does not."""
    if default is None:
        default = "off" if value is False else f"{value:g}" if type(value) is float else str(value)
    metadata = {"text": text, "default": default, "name": name, **more}
    return dataclasses.field(default=value, metadata=metadata)


def options_of(config: type) -> dict[str, Option]:
    """All choices of a dataclass whose fields are declared by `option`, by field."""
    types = get_type_hints(config)
    found = {}
    for field in dataclasses.fields(config):
        more = dict(field.metadata)
        name = more.pop("name") or field.name
        found[field.name] = Option(name, _without_none(types[field.name]), **more)
    return found


def _without_none(annotation: Any) -> Any:
    if not isinstance(annotation, UnionType):
        return annotation
    (kind,) = set(get_args(annotation)) - {type(None)}
    return kind
