"""`make bench-host-dtype`: the next token after host hits from fp8 pages, beside bfloat16.

The prompts are English that nobody made for this: docstrings of Python's standard library. Each is
asked cold, then again when the device has forgotten it. Two servers of ours do so, one with
`--smg-host-dtype fp8`; the other, asked fewer, shows how much comes of anything else. Compared is
the whole distribution of the next token: KL(cold || host hit), in nats.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import random
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.serving import machine
from bench.serving.setting import choose_model, open_console, server_parser, shown
from bench.serving.statistics import spread
from bench.serving.subjects import start_smg, started
from tools.sglang_server import SglangServer

OUT = Path(__file__).parent / "out"
BFLOAT16, FP8 = "bfloat16 in host memory", "fp8 in host memory"
POOL_TOKENS = 2048
LEAST, MOST = 350, 1500  # characters of a prompt
MODULES = """
argparse asyncio calendar codecs collections concurrent.futures configparser csv ctypes datetime
decimal difflib doctest email.message fractions functools heapq html.parser http.client inspect
ipaddress itertools json logging logging.handlers mailbox numbers optparse os pathlib pickle random
re sched shelve shutil smtplib socket sqlite3 statistics string subprocess tarfile tempfile textwrap
threading tokenize turtle typing unittest unittest.mock urllib.parse urllib.request uuid weakref
xml.dom.minidom zipfile
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = server_parser("make bench-host-dtype", __doc__, OUT / "host_dtype.json", "")
    parser.add_argument("--prompts", type=int, default=200, help="how many (200)")
    parser.add_argument("--control", type=int, default=40, help="to the other server (40)")
    return parser.parse_args(arguments)


def docstrings() -> Iterator[str]:
    for name in MODULES.split():
        module = importlib.import_module(name)
        for owner in [module, *(value for _, value in inspect.getmembers(module, inspect.isclass))]:
            text = inspect.getdoc(owner)
            if text and getattr(owner, "__module__", name).startswith(name.partition(".")[0]):
                yield text


def prompts(count: int) -> list[str]:
    """Texts of some hundred tokens each, joined where they are short; the same on each call."""
    texts = list(dict.fromkeys(docstrings()))
    random.Random(0).shuffle(texts)
    found, joined = [], ""
    for text in texts:
        joined += text + "\n\n"
        if len(joined) >= LEAST:
            found.append(joined[:MOST].rstrip() + "\n\n")
            joined = ""
    if len(found) < count:
        raise SystemExit(f"the standard library has {len(found)} such prompts, not {count}")
    return found[:count]


def start(options: argparse.Namespace, name: str) -> SglangServer:
    args = ["--max-total-tokens", str(POOL_TOKENS), "--chunked-prefill-size", "1024"]
    return start_smg(options, name, [*args, *(["--smg-host-dtype", "fp8"] if name == FP8 else [])])


def ask(server: SglangServer, prompt: str, vocabulary: int) -> tuple[np.ndarray, int]:
    """(log-probabilities of the next token [vocabulary], prompt tokens from host memory)."""
    answer = server.generate(prompt, 1, return_logprob=True, top_logprobs_num=vocabulary)
    meta = answer["meta_info"]
    found = np.full(vocabulary, -np.inf)
    for value, token, _ in meta["output_top_logprobs"][0]:
        found[token] = value
    return found, (meta.get("cached_tokens_details") or {}).get("host", 0)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.sum(np.exp(p) * (p - q)))


def measure(server: SglangServer, name: str, texts: list[str], vocabulary: int) -> dict[str, Any]:
    cold = [ask(server, text, vocabulary)[0] for text in track(texts, f"{name}: cold")]
    hits = [ask(server, text, vocabulary) for text in track(texts, f"{name}: host hits")]
    pairs = [(p, q) for p, (q, host) in zip(cold, hits, strict=True) if host]
    if not pairs:
        raise SystemExit(f"nothing left a device of {POOL_TOKENS} tokens: ask more prompts")
    divergences = [kl(p, q) for p, q in pairs]
    return {
        "prompts": len(texts),
        "host_hits": len(pairs),
        "host_tokens": sum(host for _, host in hits),
        "kl_nats": {**spread(divergences), "max": max(divergences)},
        "same_first_token": sum(int(p.argmax() == q.argmax()) for p, q in pairs) / len(pairs),
        "each_kl_nats": divergences,
        "bytes_a_token": server.get("/server_info")["internal_states"][0]["smg"]["layers"]["full"][
            "bytes_a_token"
        ],
    }


def print_table(console: Console, results: dict[str, Any]) -> None:
    table = Table(title="next token after a host hit, beside the same prompt computed")
    for heading in ("", "bytes a token", "host hits", "KL mean", "median", "99 %", "same token"):
        table.add_column(heading)
    for name in (BFLOAT16, FP8):
        row = results[name]
        seen = row["kl_nats"]
        table.add_row(
            name,
            f"{row['bytes_a_token']:,}",
            f"{row['host_hits']} of {row['prompts']}",
            *(f"{seen[key]:.2e}" for key in ("mean", "p50", "p99")),
            f"{row['same_first_token']:.1%}",
        )
    console.print(table)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    console = open_console()
    choose_model(options)
    texts = prompts(options.prompts)
    vocabulary = json.loads((Path(options.model_path) / "config.json").read_text())["vocab_size"]
    results: dict[str, Any] = {"machine": machine.describe(), "options": shown(options)}
    for name in (BFLOAT16, FP8):
        with started({name: partial(start, options, name)}) as servers:
            asked = texts if name == FP8 else texts[: options.control]
            results[name] = measure(servers[name], name, asked, vocabulary)
    print_table(console, results)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    console.print(str(options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
