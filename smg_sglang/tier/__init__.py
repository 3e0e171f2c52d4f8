"""One worker's view of the host level: find, load back, spill, hold. No SGLang.

Called by the engine's cache and streams on the scheduler thread; touches device slots that it is
given, host pages, and the memory server.
"""
