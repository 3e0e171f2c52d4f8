"""The device level of the prefix tree: SGLang's radix cache with our linker behind it.

Called by SGLang's scheduler, on its thread, once a worker process; touches the tree, the slots that
SGLang has given us, and the host tier below.
"""
