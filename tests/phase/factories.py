"""A small world: a controller whose workers are up, and short ways to say what happens."""

from smg_sglang.phase.controller import PhaseController
from smg_sglang.phase.prefixes import path_of
from smg_sglang.phase.requests import Arrival
from smg_sglang.phase.routing import RoutingConfig

BIG, SMALL = 1000, 10


def make_controller(num_prefill=1, num_decode=1, up=True, **config):
    controller = PhaseController(
        num_prefill, num_decode, RoutingConfig(split_tokens=100, patience_s=5, **config)
    )
    if up:
        for worker in controller.workers:
            controller.worker_ready(worker.index, 0.0)
    return controller


def arrival(rid="a", tokens=BIG, **fields):
    return Arrival(rid, tokens, payload=f"payload of {rid}", **fields)


def prompt(seed, length):
    return [seed * 1_000_000 + position for position in range(length)]


def chat(rid, tokens, **fields):
    return arrival(rid, len(tokens), path=path_of(tokens), **fields)
