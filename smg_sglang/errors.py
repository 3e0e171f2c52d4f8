"""Errors that a person or a caller can act on."""


class SmgError(Exception):
    """Base of all errors raised by smg_sglang."""


class ConfigError(SmgError):
    """A flag or a combination of flags cannot work; the message says what to change."""


class MemoryUnavailable(SmgError):
    """The memory server is not there, or did not answer in time: treat it as a miss."""


class TraceError(SmgError):
    """A trace cannot be used as it stands: which file, where in it, and why.

    `where` is such as "line 7" or "member trace_0001.json, request 3"; None for the whole file.
    """

    def __init__(self, file: str, where: str | None, reason: str) -> None:
        super().__init__(f"{file}{f', {where}' if where else ''}: {reason}")
        self.file = file
        self.where = where
        self.reason = reason
