"""The tier below host memory: which pages go to storage, and how they come back.

`service` runs in a process of its own, `python -m smg_sglang storage`, beside the memory server, of
which it is a client like any other; `client` is a worker's view of it. What stores the bytes is a
`Backend`: the engine's drives SGLang's own. No torch and no SGLang here.
"""
