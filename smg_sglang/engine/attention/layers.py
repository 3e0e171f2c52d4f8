"""What a layer of a model asks of attention."""

from __future__ import annotations

from typing import Any


def asked_in_vain(layer: Any, kwargs: dict[str, Any]) -> list[str]:
    """What a layer asks of attention, beside keys and values, that none of our backends has."""
    asked = [name for name, value in kwargs.items() if value is not None]
    return [*asked, "temperature by length"] if layer.xai_temperature_len > 0 else asked
