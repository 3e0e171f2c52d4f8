"""What SGLang's layers ask of attention, and how they call a backend."""

from __future__ import annotations

from typing import Any

import torch


def asked_in_vain(layer: Any, kwargs: dict[str, Any]) -> list[str]:
    """What a layer asks of attention, beside keys and values, that none of our backends has."""
    asked = [name for name, value in kwargs.items() if value is not None]
    return [*asked, "temperature by length"] if layer.xai_temperature_len > 0 else asked


class ExtendAndDecode:
    """Both calls of a layer go through `_forward(stock, ...)`; `stock` is what the class that comes
    next in the order of classes does with them."""

    def forward_extend(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Attend the new tokens."""
        return self._forward(super().forward_extend, *args, **kwargs)  # type: ignore[misc]

    def forward_decode(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Attend one new token a request."""
        return self._forward(super().forward_decode, *args, **kwargs)  # type: ignore[misc]

    def _forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError
