"""`make bench-replay TRACE=...`: a published trace against stock SGLang and ours, or any server.

Traces: Mooncake (github.com/kvcache-ai/Mooncake, FAST25-release/traces), Qwen-Bailian
(github.com/alibaba-edu/qwen-bailian-usagetraces-anon), coding-agent sessions
(github.com/callanjfox/kv-cache-tester, traces), or one JSON of token ids a line. Equal block ids
become equal words, blocks of a large model's context fewer tokens for a small model's; each request
is sent at its time. Without --url, a stock server and one with --enable-smg are started and asked
one after the other, each from an empty cache; a server at --url keeps what it has, unless --flush.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import requests
from rich.console import Console
from rich.progress import Progress

from bench.replay.asks import Ask, Selection, asks, infinite_hits, select
from bench.replay.plot import plot
from bench.replay.run import replay, warm_up
from bench.replay.summary import described, figures, print_table, summary
from bench.replay.words import Words, words_of
from bench.serving import machine
from bench.serving.setting import choose_model, open_console, shown
from bench.serving.subjects import PAGE_SIZE, SMG, STOCK, attention_backend, running
from smg_sglang.errors import TraceError
from smg_sglang.simulate.options import above_0, count
from smg_sglang.trace import TraceFormat
from tools.sglang_server import ServerDied

OUT = Path(__file__).parents[1] / "out"
Result = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """What every server is asked."""

    title: str
    asks: list[Ask]
    infinite: list[int]
    words: Words
    dropped: int


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make bench-replay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("trace", type=Path, help="file or folder; .gz and .tgz are read in place")
    add("--format", choices=[f.value for f in TraceFormat], help="default: seen from the file")
    add("--limit", type=count, help="only the first requests")
    add("--sessions", type=count, help="only the first sessions, where the trace has some")
    add("--block-tokens", type=count, default=0, help="tokens a block becomes (what fits)")
    add("--speed", type=above_0, default=1.0, help="times the trace's own pace (1)")
    add("--in-flight", type=count, help="at most so many requests at once (default: an open loop)")
    add("--max-answer", type=count, default=32, help="tokens of an answer at most (32)")
    add("--context", type=count, default=8192, help="drop requests that are longer (8192)")
    add("--send", choices=["text", "ids"], help="default: text where the tokenizer is at hand")
    add("--url", nargs="+", default=[], metavar="[NAME=]URL", help="servers that run already")
    add("--flush", action="store_true", help="empty the caches of --url servers before the trace")
    add("--page-size", type=count, default=PAGE_SIZE, help="for the infinite cache's share (16)")
    group = parser.add_argument_group("servers that are started")
    add = group.add_argument
    add("--model-path", help="a model folder or hub name (default: the demo model)")
    add("--only", nargs="+", choices=[STOCK, SMG], default=[STOCK, SMG])
    add("--pool-tokens", type=count, default=4096, help="tokens of the device pool (4096)")
    add("--host-gb", type=above_0, default=2.0, help="GiB of host memory for pages (2)")
    add("--dtype", default="bfloat16", help="of weights and KV (bfloat16)")
    add("--attention-backend", help="on both servers (default: smg on a CPU)")
    add("--server-args", default="", help="more flags for both servers, as one string")
    parser.add_argument("--json", type=Path, default=OUT / "replay.json", help="PNG lies beside")
    options = parser.parse_args(arguments)
    options.attention_backend = attention_backend(options.attention_backend)
    return options


def prepare(options: argparse.Namespace, model: str) -> Workload:
    """The trace as prompts; the whole of it is read before anything is sent."""
    selection = Selection(
        limit=options.limit,
        sessions=options.sessions,
        block_tokens=options.block_tokens,
        speed=options.speed,
        context=options.context,
        max_answer=options.max_answer,
    )
    wanted = TraceFormat(options.format) if options.format else None
    chosen, dropped = select(options.trace, selection, wanted)
    if not chosen:
        sys.exit(
            f"{options.trace} has no request that fits, {dropped} dropped: see --context and "
            "--block-tokens"
        )
    words = words_of(model)
    sent = asks(chosen, words, selection)
    block = chosen[0].block_tokens
    title = (
        f"{options.trace.name}: {len(sent)} requests, {options.speed:g} times their pace, "
        f"blocks of {block} token{'s' if block > 1 else ''}"
    )
    if dropped:
        title += f", {dropped} dropped (longer than {options.context:,} tokens)"
    return Workload(title, sent, infinite_hits(sent, options.page_size), words, dropped)


def ask_server(url: str, workload: Workload, options: argparse.Namespace, bar: Progress) -> Result:
    """Warm-up, flush, the trace, and what the server says of itself after it."""
    task = bar.add_task(url, total=len(workload.asks))
    asyncio.run(warm_up(url, workload.words))
    if options.url and not options.flush:
        bar.console.print(f"{url} keeps its caches (--flush empties them): it may hit older pages")
    else:
        bar.console.print(f"emptying the caches of {url}")
        flush(url)
    as_text = options.send == "text" or (options.send is None and workload.words.texts)
    outcomes, seconds = asyncio.run(
        replay(
            url,
            workload.asks,
            text=workload.words.text if as_text else None,
            in_flight=options.in_flight,
            advance=partial(bar.advance, task),
        )
    )
    found = summary(outcomes, seconds, workload.infinite)
    return {**found, "load_average": os.getloadavg()[0], "smg": smg_state(url)}


def flush(url: str, timeout_s: float = 60.0) -> None:
    """Empty caches; a busy server says no, so ask again."""
    deadline = time.monotonic() + timeout_s
    while requests.post(f"{url}/flush_cache", timeout=60).status_code != 200:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{url} did not flush its cache within {timeout_s:.0f} s")
        time.sleep(0.2)


def smg_state(url: str) -> Any:
    """What a server of ours says of its memory tier; None for others."""
    info = requests.get(f"{url}/server_info", timeout=60).json()
    states = info.get("internal_states") or [{}]
    return states[0].get("smg")


def named(urls: list[str]) -> dict[str, str]:
    """URLs by name: NAME=URL, or the URL is its own name."""
    pairs = [url.split("=", 1) if "=" in url.split("://")[0] else (url, url) for url in urls]
    return {name: url.rstrip("/") for name, url in pairs}


def run(console: Console, options: argparse.Namespace) -> Result:
    """All servers, one after the other; their table."""
    with ExitStack() as stack:
        urls = named(options.url)
        workload = prepare(options, _model(options, urls))
        if not urls:
            with console.status("starting the servers; this takes about a minute"):
                logs = options.json.parent / "logs"
                servers = stack.enter_context(running(options.only, options, logs))
            urls = {name: server.url for name, server in servers.items()}
        trace = described(workload.asks, workload.infinite, workload.dropped)
        console.print(_said(trace))
        if workload.dropped:
            console.print(f"{workload.dropped} dropped: longer than --context {options.context}")
        with Progress(console=console) as bar:
            subjects = {name: ask_server(url, workload, options, bar) for name, url in urls.items()}
    print_table(console, workload.title, subjects)
    return {
        "title": workload.title,
        "trace": trace,
        "subjects": subjects,
        "figures": figures(workload.title, subjects),
    }


def _model(options: argparse.Namespace, urls: dict[str, str]) -> str:
    """Whose words to use: the model that is asked for, or the one that the first server has."""
    if options.model_path:
        return str(options.model_path)
    for url in urls.values():
        told = requests.get(f"{url}/model_info", timeout=60).json()
        if "model_path" not in told:
            raise RuntimeError(f"{url} does not say its model: is it an SGLang server?")
        return str(told["model_path"])
    choose_model(options)
    return str(options.model_path)


def _said(trace: Result) -> str:
    return (
        f"{trace['requests']} requests in {trace['seconds']:.0f} s, {trace['prompt_tokens']:,} "
        f"prompt tokens (longest {trace['longest_prompt']:,}), {trace['output_tokens']:,} answer "
        f"tokens; an infinite cache has {trace['infinite_hit_share']:.1%}"
    )


def main(arguments: list[str]) -> int:
    """1 where a request failed."""
    options = parse(arguments)
    console = open_console(140)
    if options.model_path:
        choose_model(options)
    if options.json.is_dir():
        sys.exit(f"--json {options.json} is a folder: name a file in it")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    described_machine = machine.describe()
    results = run(console, options)
    results["machine"] = described_machine
    results["options"] = shown(options)
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    plot(results, options.json.with_suffix(".png"))
    console.print(f"{options.json}\n{options.json.with_suffix('.png')}")
    return int(any(row["failed"] for row in results["subjects"].values()))


def in_a_sentence(arguments: list[str]) -> int:
    """`main`; what goes wrong outside of this program ends it with one sentence."""
    try:
        return main(arguments)
    except TraceError as error:
        sys.exit(f"The trace cannot be read: {error}")
    except ServerDied as error:
        sys.exit(f"A server did not start: {error}")
    except requests.ConnectionError as error:
        where = error.request.url if error.request else "its address"
        sys.exit(f"No server answers at {where}: is it running, and is --url its address?")
    except (RuntimeError, TimeoutError, aiohttp.ClientError, requests.RequestException) as error:
        said = next(iter(str(error).splitlines()), type(error).__name__)
        sys.exit(f"The replay ended early: {said}")


if __name__ == "__main__":
    sys.exit(in_a_sentence(sys.argv[1:]))
