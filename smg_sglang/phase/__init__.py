"""Prefill and decode on separate workers: who does what, and what happens when one of them dies.

State machines and routing only: no sockets, no torch, no SGLang, and no clock: the time is passed
in. `engine/split/controller.py` is the shell that feeds them; `bench/split_sim.py` simulates them.
"""
