"""A context eight times the KV pool, streamed from host memory, beside a pool that holds all of it,
on a CUDA device.

    python -m bench.gpu_context [--help]

The model has the shape of Llama-3.1-8B (but for the vocabulary) and made-up weights. The servers
have the device one after the other, since both do not fit, and get the same prompts. Where the
device cannot hold such a prompt, prompts are as long as it can. Has not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import context
from bench.context import POOL, STREAMED
from bench.serving import machine
from bench.serving.client import Answer
from bench.serving.setting import choose_model, open_console, shown
from bench.serving.subjects import started
from bench.serving.workloads import words
from bench.transfer import dated
from tools.models.dense import Recipe
from tools.models.recipe import model_without_weights
from tools.sglang_server import SglangServer

LLAMA_8B = {"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128}
LLAMA_8B |= {"intermediate": 14336}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_context", description=__doc__)
    add = parser.add_argument
    add("--model-path", help="a model folder (default: the shape of Llama-3.1-8B, no weights)")
    add("--tokens", type=int, default=1 << 19, help="tokens of a prompt (524288)")
    add("--pool-tokens", type=int, default=1 << 16, help="tokens of the small pool (65536)")
    add("--answer", type=int, default=32, help="tokens of an answer (32)")
    add("--repeats", type=int, default=1, help="prompts to each server (1, which takes minutes)")
    add("--chunk", type=int, default=8192, help="--chunked-prefill-size of both (8192)")
    add("--dtype", default="bfloat16", help="of weights and KV (bfloat16)")
    add("--host-gb", type=float, default=72.0, help="GiB of host memory for pages (72)")
    add("--server-args", default="", help="more flags for both servers, as one string")
    add("--out", type=Path, help="the JSON file (bench/results/context-DEVICE-DATE.json)")
    options = parser.parse_args(arguments)
    if options.out is None:
        if not torch.cuda.is_available():
            raise SystemExit("bench.gpu_context needs a CUDA device; PyTorch sees none")
        options.out = dated("context")
    if options.model_path is None:
        shape = Recipe("bfloat16", context=options.tokens + 4096, **LLAMA_8B)
        options.model_path = str(model_without_weights(shape))
        options.server_args += " --load-format dummy"
    return options


def ask_all(server: SglangServer, options: argparse.Namespace) -> list[Answer]:
    """Answers to the same prompts on every server."""
    rng = random.Random(1)
    lengths = [(600, 8), *[(options.tokens, options.answer)] * options.repeats]
    asked = [(words(rng, tokens), answer) for tokens, answer in lengths]
    answers = [asyncio.run(context.ask(server, *each)) for each in asked]
    return answers[1:]  # the first was to warm up


def shorten(server: SglangServer, options: argparse.Namespace) -> None:
    """Prompts of what the device holds, if that is less; SystemExit if it is no more than the small
    pool."""
    held = server.get("/server_info")["max_total_num_tokens"]
    options.tokens = min(options.tokens, held - options.answer - 512)
    if options.tokens <= options.pool_tokens:
        raise SystemExit(
            f"the device holds {held} tokens beside the model: give a --pool-tokens far below that"
        )


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    console = open_console()
    choose_model(options)
    answers: dict[str, list[Answer]] = {}
    results: dict[str, Any] = {"machine": machine.describe()}
    for name in (POOL, STREAMED):
        start = partial(context.start, options, name)
        with console.status(name), started({name: start}) as servers:
            if name == POOL:
                shorten(servers[name], options)
            answers[name] = ask_all(servers[name], options)
    results |= {"options": shown(options)} | context.summarise(answers, options)
    context.write(console, results, options)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
