"""What an operator can choose, declared once (`choices`), checked, and told to people."""

from smg_sglang.config.checks import make_config as make_config
from smg_sglang.config.choices import OPTIONS as OPTIONS
from smg_sglang.config.choices import SmgConfig as SmgConfig
from smg_sglang.config.policies import (
    DEFAULT_EVICTION as DEFAULT_EVICTION,
)
from smg_sglang.config.policies import (
    DEFAULT_HINT_SHARE as DEFAULT_HINT_SHARE,
)
from smg_sglang.config.policies import (
    DEFAULT_SHARE as DEFAULT_SHARE,
)
from smg_sglang.config.policies import (
    DEFAULT_SPLIT_TOKENS as DEFAULT_SPLIT_TOKENS,
)
from smg_sglang.config.policies import (
    MAX_PAGE_SIZE as MAX_PAGE_SIZE,
)
from smg_sglang.config.policies import (
    MAX_WAITING_SHARE as MAX_WAITING_SHARE,
)
from smg_sglang.config.policies import (
    MIN_HOST_GB as MIN_HOST_GB,
)
from smg_sglang.config.policies import (
    EvictionName as EvictionName,
)
from smg_sglang.config.policies import (
    HostDtype as HostDtype,
)
from smg_sglang.config.policies import (
    StorageName as StorageName,
)
from smg_sglang.config.policies import (
    WritePolicy as WritePolicy,
)
