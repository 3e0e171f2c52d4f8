"""Errors that a person or a caller can act on."""


class SmgError(Exception):
    """Base of all errors raised by smg_sglang."""


class ConfigError(SmgError):
    """A flag or a combination of flags cannot work; the message says what to change."""


class MemoryUnavailable(SmgError):
    """The memory server is not there, or did not answer in time: treat it as a miss."""
