"""A platform for machines without an accelerator: which cores, which defaults.

Called by SGLang while it chooses its platform, in each process, before arguments exist; touches
torch's threads, core binding and the environment.
"""
