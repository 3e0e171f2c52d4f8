"""Logging of what may happen without end."""

import logging


class RareLog:
    """Warns at the first, second, fourth, eighth... time: a client gone mad must not fill the disk.

    One thread.
    """

    def __init__(self, log: logging.Logger, most_kinds: int = 64) -> None:
        self._log = log
        self._most_kinds = most_kinds
        self._counts: dict[str, int] = {}

    def warn(self, what: str, detail: str = "", *, trace: bool = False) -> None:
        """`what` happened, which is counted for itself; `detail` may differ each time.

        With `trace`, the traceback of the exception at hand too.
        """
        kind = what if what in self._counts or len(self._counts) < self._most_kinds else ""
        count = self._counts[kind] = self._counts.get(kind, 0) + 1
        if count & (count - 1) == 0:
            self._log.warning("%s (time %d) %s", what, count, detail, exc_info=trace)
