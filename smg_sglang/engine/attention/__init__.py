"""SGLang attention backends: a CPU's, and those that read host memory on CUDA.

Called by SGLang's model runner on the scheduler thread, once a batch and once a layer; touches the
KV pool, and host pages that streams hold.
"""
