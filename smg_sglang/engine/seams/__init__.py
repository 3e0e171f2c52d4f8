"""Where SGLang calls us: the plugin's entry point, its hooks, start and end, the offline engine.

Called by SGLang in each of its processes, on whatever thread it hooks; may touch any room, and
nothing of SGLang's before `--enable-smg` is given.
"""
