"""`python -m smg_sglang plan`: ms a token, how many contexts fit, and what they cost."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from smg_sglang.errors import ConfigError
from smg_sglang.plan import ways
from smg_sglang.plan.shape import LATENT, decode_shape
from smg_sglang.plan.ways import Box, Way
from smg_sglang.simulate.model import MODELS
from smg_sglang.simulate.options import above_0, count

#: One H100 SXM of a server. Device: 3,350 GB/s, 80 GB, 700 W (NVIDIA's data sheet), and 500 W for
#: its part of the host. Link: 44 GB/s, measured (docs/gpu.md). Host memory: 300 GB/s, eight
#: channels of DDR5-4800 (307). Attention by the CPU: 17.5 GB/s a core on 12 cores and 1.5 TFLOPS,
#: from docs/host_attention.md, not measured on that machine. Prices: given.
DEFAULT = Box(
    device_gbps=3350,
    link_gbps=44,
    dram_gbps=300,
    attention_gbps=210,
    cpu_tflops=1.5,
    device_gib=74.5,
    host_gib=512,
    hop_us=20,
    dollars_an_hour=3.0,
    watts=1200,
)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for what one sentence has told."""
    options = _parser().parse_args(arguments)
    try:
        shape = decode_shape(options.model)
    except ConfigError as error:
        print(f"smg_sglang plan: {error}", file=sys.stderr)
        return 2
    given = {name: getattr(options, name) for name in asdict(DEFAULT)}
    box = replace(DEFAULT, **{name: value for name, value in given.items() if value is not None})
    report = plan(options.model, box, options.context, options.batch, options.cpu_dollars_an_hour)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    _show(Console(), shape.name, report)
    return 0


def plan(
    model: str, box: Box, context: int, batch: int, cpu_dollars_an_hour: float
) -> dict[str, Any]:
    """All that is printed, as numbers; `ways` has None where a batch does not fit."""
    shape = decode_shape(model)
    rows = [*ways.ways(shape, box, context, batch), ways.cpu_worker(shape, box, context, batch)]
    return {
        "model": model,
        "context": context,
        "batch": batch,
        "box": asdict(box),
        "kv_bytes_a_token": shape.kv_bytes,
        "weight_gb": shape.weight_bytes / ways.GB,
        "host_attention_gbps": ways.host_attention_gbps(shape, box),
        "ways": [_row(way, box, batch, cpu_dollars_an_hour) for way in rows],
    }


def _row(way: Way, box: Box, batch: int, cpu_dollars_an_hour: float) -> dict[str, Any]:
    found: dict[str, Any] = {"way": way.name, "fits": way.fits, "cpu_share": way.cpu_share}
    if way.step_s is None:
        return found | {"ms_a_token": None}
    price = cpu_dollars_an_hour if way.name == "CPU worker" else box.dollars_an_hour
    return found | {
        "ms_a_token": 1000 * way.step_s,
        "tokens_a_second": batch / way.step_s,
        "dollars_a_million": ways.dollars_a_million(way.step_s, batch, price),
        "kwh_a_million": None
        if way.name == "CPU worker"
        else ways.kwh_a_million(way.step_s, batch, box.watts),
    }


def _show(console: Console, name: str, report: dict[str, Any]) -> None:
    table = Table(
        "where the context lies",
        "fit",
        "ms a token",
        "tokens/s",
        "$ a million",
        "kWh a million",
        title=f"{name}, {report['batch']} x {report['context']} tokens, "
        f"{report['kv_bytes_a_token'] / 1024:.1f} KiB each",
        title_justify="left",
    )
    for row in report["ways"]:
        what = row["way"]
        if what == "both":
            what += f" ({row['cpu_share']:.0%} by the CPU)"
        if row["ms_a_token"] is None:
            table.add_row(what, str(row["fits"]), *["does not fit", "", "", ""])
            continue
        kwh = row["kwh_a_million"]
        table.add_row(
            what,
            str(row["fits"]),
            f"{row['ms_a_token']:.1f}",
            f"{row['tokens_a_second']:.1f}",
            f"{row['dollars_a_million']:.2f}",
            "" if kwh is None else f"{kwh:.1f}",
        )
    console.print(table)
    cheapest = min(
        (row for row in report["ways"] if row["ms_a_token"] is not None),
        key=lambda row: row["dollars_a_million"],
        default=None,
    )
    if cheapest is not None:
        console.print(f"cheapest a token: {cheapest['way']}")
    console.print(
        f"The CPU attends {report['host_attention_gbps']:.0f} GB/s of this model's context. Rates "
        "are given or defaults (--help): measure yours with `smg_sglang doctor` and "
        "`make bench-host-attention`."
    )


_HELP = {
    "device_gbps": "GB/s of the device's memory",
    "link_gbps": "GB/s from host memory to the device, as `smg_sglang doctor` measures it",
    "dram_gbps": "GB/s of host memory",
    "attention_gbps": "GB/s of keys and values that the CPU attends, as "
    "`make bench-host-attention` measures it",
    "cpu_tflops": "TFLOPS in float32 of the cores that attend",
    "device_gib": "GiB of the device's memory",
    "host_gib": "GiB of host memory for pages",
    "hop_us": "microseconds to the CPU and back, of one layer",
    "dollars_an_hour": "price of the machine",
    "watts": "power of the machine",
}


def _parser() -> argparse.ArgumentParser:
    known = ", ".join([*MODELS, *LATENT])
    parser = argparse.ArgumentParser(
        prog="python -m smg_sglang plan",
        description="Milliseconds a token, and what it costs, with contexts in the device's "
        "memory, streamed from host memory, attended there by the CPU, or both (docs/cost.md).",
    )
    add = parser.add_argument
    add("--model", required=True, help=f"{known}, or the path of a dense model's config.json")
    add("--context", type=count, default=131072, help="tokens of each request (131072)")
    add("--batch", type=count, default=1, help="requests at a time (1)")
    add("--cpu-dollars-an-hour", type=above_0, default=1.0, help="of a machine without a GPU (1)")
    add("--json", type=Path, metavar="FILE", help="write all of it there")
    for name, value in asdict(DEFAULT).items():
        flag = f"--{name.replace('_', '-')}"
        add(flag, dest=name, type=above_0, metavar="N", help=f"{_HELP[name]} ({value:g})")
    return parser
