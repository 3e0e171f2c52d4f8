"""SGLang's storage backends, driven as they are: the storage process of a memory server.

Called by `python -m smg_sglang storage`, in a process of its own without scheduler and model;
touches what the backend stores, and staging memory of that process.
"""
