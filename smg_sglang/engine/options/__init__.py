"""Our flags in SGLang's arguments: parsed, checked, refused, carried to the workers.

Called in the main process before anything starts, and read everywhere; touches arguments only.
"""
