"""Prefill and decode on workers of their own: processes, sockets and clock of the controller.

Called by SGLang's data-parallel controller process, but for `publication` (in a prefill worker) and
`launch` (in the main process); touches messages and processes, never KV.
"""
