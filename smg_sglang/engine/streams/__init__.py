"""Requests whose context is larger than the device: who is one, what it may have, where it lies.

Called by the cache and by hooks in SGLang's admission, on the scheduler thread; touches slots of
its own requests, their rows of the token table, and host pages.
"""
