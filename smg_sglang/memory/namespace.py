"""What must be equal for two workers to read each other's pages."""

from typing import Annotated

import msgspec

Positive = Annotated[int, msgspec.Meta(ge=1)]


class Namespace(msgspec.Struct, frozen=True):
    """Identity of a set of pages; pages of different namespaces never meet.

    `model` is a digest of the weights' identity, `layout` describes what lies where in a
    page (layers, heads, parts). `page_size` is in tokens, `page_bytes` is the size of one
    page of all layers of one TP rank.
    """

    model: str
    dtype: str
    layout: str
    page_size: Positive
    page_bytes: Positive
    tp_rank: Annotated[int, msgspec.Meta(ge=0)] = 0
    tp_size: Positive = 1
