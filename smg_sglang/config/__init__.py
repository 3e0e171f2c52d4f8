"""What an operator can choose, declared once (`choices`), checked, and told to people."""

from smg_sglang.config.checks import make_config
from smg_sglang.config.choices import OPTIONS, SmgConfig
from smg_sglang.config.policies import (
    DEFAULT_EVICTION,
    DEFAULT_SHARE,
    DEFAULT_SPLIT_TOKENS,
    MAX_PAGE_SIZE,
    MAX_WAITING_SHARE,
    MIN_HOST_GB,
    EvictionName,
    WritePolicy,
)

__all__ = [
    "DEFAULT_EVICTION",
    "DEFAULT_SHARE",
    "DEFAULT_SPLIT_TOKENS",
    "MAX_PAGE_SIZE",
    "MAX_WAITING_SHARE",
    "MIN_HOST_GB",
    "OPTIONS",
    "EvictionName",
    "SmgConfig",
    "WritePolicy",
    "make_config",
]
