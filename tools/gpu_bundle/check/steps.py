"""The steps without servers of our own: commands of the project, with limits."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

from tools.gpu_bundle.check.limits import run
from tools.gpu_bundle.check.scale import Scale, small_model
from tools.gpu_bundle.check.table import Table

ROOT = Path(__file__).resolve().parents[3]

ENVIRONMENT = """
import platform, shutil, subprocess, torch, triton, transformers
print("python", platform.python_version())
print("torch", torch.__version__, "triton", triton.__version__, "transformers",
      transformers.__version__)
print("device", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
print("nvcc", shutil.which("nvcc"))
"""


class Commands:
    """Runs them in order; each adds rows to the table. Seconds are the step's own."""

    def __init__(self, scale: Scale, out: Path, table: Table) -> None:
        self._scale, self._out, self._table = scale, out, table

    def environment(self, seconds: float) -> None:
        log = self._run("environment", seconds, "-c", ENVIRONMENT)
        for line in log.read_text().strip().splitlines():
            what, _, figure = line.partition(" ")
            self._table.row("environment", what, figure)

    def compileall(self, seconds: float) -> None:
        """Without it each process that imports SGLang compiles it anew."""
        folders = [
            folder for folder in (ROOT.parent / "site", ROOT / "smg_sglang") if folder.is_dir()
        ]
        self._run("compileall", seconds, "-m", "compileall", "-q", "-j", "0", *map(str, folders))

    def tests(self, seconds: float) -> None:
        with_servers = ("test_streams.py", "test_stream_texts.py")
        ignored = [f"--ignore=tests/gpu/{name}" for name in with_servers]
        options = ("-q", "-rf", "-p", "no:cacheprovider")
        log = self._run(
            "tests", seconds, "-m", "pytest", "tests/gpu", *ignored, *options, check=False
        )
        lines = log.read_text(errors="replace").splitlines()
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        for line in failed:
            self._table.row("tests", line[:100], "failed")
        self._table.row(
            "tests", "tests/gpu without servers", lines[-1].strip("= ") if lines else "-"
        )

    def copies(self, seconds: float) -> None:
        file = self._out / "transfer.json"
        shape, device = ("Llama-3.1-8B", "cuda") if self._scale.on_gpu else ("SmolLM2-135M", "cpu")
        options = ["--device", device, "--shapes", shape, "--rounds", "5", "--out", str(file)]
        self._run("copies", seconds, "bench/transfer.py", *options)
        for case in json.loads(file.read_text())["results"]:
            rates = {name: sorted(all_)[len(all_) // 2] for name, all_ in case["gb_per_s"].items()}
            plain = max(rate for name, rate in rates.items() if name.startswith("plain"))
            for name, rate in rates.items():
                what = f"{name}, page {case['page_size']}, {case['order']}"
                self._table.row("copies", what, f"{rate:.1f} GB/s, {rate / plain:.0%} of plain")
            if "measured" in case:
                self._table.row("copies", "measured at start", str(case["measured"]))

    def context(self, seconds: float) -> None:
        """P10. Both servers of it have the device one after the other."""
        file = self._out / "context.json"
        scale = self._scale
        options = ["--tokens", str(scale.context), "--out", str(file), "--repeats", "1"]
        options += ["--dtype", scale.dtype, "--host-gb", str(scale.host_gb), "--answer", "32"]
        if scale.on_gpu:
            options += ["--pool-tokens", str(scale.context_pool)]
            self._run("context", seconds, "-m", "bench.gpu_context", *options)
        else:
            options += ["--share", str(scale.context // scale.context_pool)]
            options += ["--model-path", str(small_model(scale))]
            self._run("context", seconds, "-m", "bench.context", *options)
        found = json.loads(file.read_text())
        for name, kinds in found["spread"].items():
            rates = ", ".join(f"{kind} {s['p50']:.1f} tok/s" for kind, s in kinds.items())
            self._table.row("context", name, rates)
        for kind, ratio in found["streamed_over_pool"].items():
            self._table.row("context", f"{kind}, streamed over pool", f"{ratio['ratio']:.2f}")

    def split(self, seconds: float) -> None:
        """Workers on one device, each with weights of its own."""
        file, scale = self._out / "split.json", self._scale
        options = ["--model-path", str(small_model(scale)), "--dtype", scale.dtype]
        options += ["--out", str(file), "--turns", "1", "--longs", "2", "--streams", "4"]
        options += ["--long-tokens", str(scale.long_prompt), "--hand-offs", "2"]
        options += ["--pool-tokens", str(4 * scale.long_prompt), "--pause-s", "0.5"]
        options += ["--host-gb", str(scale.host_gb / 4), f"--server-args={self._split_args()}"]
        self._run("split", seconds, "-m", "bench.split", *options)
        found = json.loads(file.read_text())
        for name, figures in found["figures"].items():
            shown = (
                f"ITL p99 {figures['itl_p99_ms']:.0f} ms, long TTFT {figures['ttft_p50_s']:.2f} s"
            )
            self._table.row("split", name, shown)

    def _split_args(self) -> str:
        """Four workers of three servers share the device."""
        return re.sub(r"(?<=--mem-fraction-static )\S+", "0.8", self._scale.server_args)

    def _run(self, step: str, seconds: float, *arguments: str, check: bool = True) -> Path:
        """The log. RuntimeError with its last line where the command failed."""
        log = self._out / "logs" / f"{step}.log"
        status = run([sys.executable, *arguments], seconds, log)
        if check and status != 0:
            lines = log.read_text(errors="replace").strip().splitlines() or ["nothing was said"]
            raise RuntimeError(f"status {status}: {lines[-1][:160]} ({os.path.relpath(log)})")
        return log
