"""Says which file of ours depends on what a contract test pins."""

from __future__ import annotations

import functools


def needed_by(ours):
    """Name the file of ours that depends on what a test pins."""

    def decorate(test):
        @functools.wraps(test)
        def pinned(*args, **kwargs):
            try:
                return test(*args, **kwargs)
            except BaseException as error:
                error.add_note(f"smg_sglang/{ours} depends on this")
                raise

        return pinned

    return decorate
