"""`make soak MINUTES=30`: everything at once for a long time, and nothing may be left behind.

Two servers on one memory server with storage, of a small random model in float32. Chats that grow,
documents, prompts of several tenants, aborted requests; meanwhile caches are flushed, weights are
loaded again, the memory server, its storage process and whole servers are killed, stopped and
started. Probes, whose answers were noted at the beginning, must say the same all the time. At the
end: no lease, no half-written page, no quarantined page, as many descriptors and threads as after
the first third, and how memory has grown.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import requests
from rich.console import Console

from tools.models import RECIPES
from tools.models.recipe import random_model
from tools.sglang_server import SglangServer

OUT = Path(__file__).parent / "out"
VOCABULARY = 49_000
POOL_TOKENS = 2048
SAMPLE_S = 5.0
TROUBLE_S = (3.0, 12.0)
#: A server takes most of a minute to start, so that it is killed less often than others.
SERVER_PAUSE_S = 150.0


class Memory:
    """The memory server, which can be killed and started again where it was."""

    def __init__(self, folder: Path) -> None:
        self.address = folder / "memory"
        config = {"file_storage_path": str(folder / "pages"), "max_size": "256M"}
        self._command = [
            *(sys.executable, "-m", "smg_sglang", "memory", "--address", str(self.address)),
            *("--host-gb", "0.0625", "--log-level", "error"),
            *("--storage", "file", "--storage-config", json.dumps(config)),
        ]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.start()

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        time.sleep(2.0)
        self.process.send_signal(signal.SIGCONT)

    def kill_storage(self) -> None:
        for child in psutil.Process(self.process.pid).children():
            child.kill()

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        self.process.wait(timeout=30)


class Soak:
    """`run` and what it starts; all counters are of any thread."""

    def __init__(self, folder: Path, minutes: float, seed: int, console: Console) -> None:
        self._rng, self._console = random.Random(seed), console
        self._model = random_model(RECIPES["dense"])
        self._args = (
            *("--dtype", "float32", "--max-total-tokens", str(POOL_TOKENS)),
            *("--chunked-prefill-size", "512", "--enable-metrics", "--log-level", "error"),
            *("--enable-smg", "--smg-prefetch"),
        )
        self.memory = Memory(folder)
        while not (self.memory.address / "storage").exists():
            time.sleep(0.2)
        self.servers = [self._server(), self._server()]
        for server in self.servers:
            server.wait_ready()
        self._up = [True, True]
        self._end = time.monotonic() + 60 * minutes
        self.done: Counter[str] = Counter()
        self.faults: list[str] = []
        self.samples: dict[str, list[tuple[float, int, int, int]]] = defaultdict(list)
        self._probes = [self._tokens(seed=n, length=150 + 190 * n) for n in range(6)]
        self._answers = [self.servers[0].generate(p, 12)["output_ids"] for p in self._probes]

    def _server(self) -> SglangServer:
        address = f"ipc://{self.memory.address}"
        return SglangServer(self._model, (*self._args, "--smg-memory", address))

    def _tokens(self, seed: int, length: int) -> list[int]:
        rng = random.Random(seed)
        return [rng.randrange(100, VOCABULARY) for _ in range(length)]

    def run(self) -> None:
        threads = [threading.Thread(target=self._work, args=(n,)) for n in range(3)]
        threads += [threading.Thread(target=self._sample)]
        for thread in threads:
            thread.start()
        last_server = time.monotonic()
        while time.monotonic() < self._end:
            time.sleep(self._rng.uniform(*TROUBLE_S))
            troubles: list[Callable[[], None]] = [
                self.memory.kill, self.memory.pause, self.memory.kill_storage,
                self._flush, self._reload_weights,
            ]  # fmt: skip
            trouble = self._rng.choice(troubles)
            left = self._end - time.monotonic()
            if time.monotonic() - last_server > SERVER_PAUSE_S and left > SERVER_PAUSE_S:
                trouble, last_server = self._kill_server, time.monotonic()
            name = trouble.__name__.strip("_")
            try:
                trouble()
                self.done[f"trouble: {name}"] += 1
            except Exception as error:
                self.faults.append(f"{name}: {error!r}")
            self._console.print(f"{left:6.0f} s left, {name}, {sum(self.done.values())} done")
        for thread in threads:
            thread.join()
        self._settle()

    # ---- work ----

    def _work(self, number: int) -> None:
        rng = random.Random(number)
        chats: list[list[int]] = []
        while time.monotonic() < self._end:
            at = rng.randrange(2)
            if not self._up[at]:
                at = 1 - at
            kind = rng.choice(["probe", "probe", "chat", "document", "tenant", "abort"])
            try:
                self._ask(kind, at, rng, chats)
                self.done[kind] += 1
            except requests.RequestException as error:
                # What was under way on a server that was killed; nothing else may fail.
                time.sleep(1.0)
                if self._up[at] and kind != "abort":
                    self.faults.append(f"{kind}: {error!r}")

    def _ask(self, kind: str, at: int, rng: random.Random, chats: list[list[int]]) -> None:
        server = self.servers[at]
        if kind == "probe":
            n = rng.randrange(len(self._probes))
            up = self._up[at]
            said = server.generate(self._probes[n], 12)["output_ids"]
            if said != self._answers[n] and up:
                self.faults.append(f"probe {n} said something else")
        elif kind == "chat":
            if len(chats) < 4 or rng.random() < 0.2:
                chats.append(self._tokens(rng.randrange(1 << 30), 100))
                del chats[:-4]
            chat = rng.choice(chats)
            chat += self._tokens(rng.randrange(1 << 30), rng.randrange(20, 80))
            del chat[1200:]
            chat += server.generate(chat, rng.randrange(1, 24))["output_ids"]
        elif kind == "abort":
            with contextlib.suppress(requests.Timeout):
                server.generate(self._tokens(rng.randrange(40), 900), 200, timeout_s=0.2)
        else:
            salt = {"cache_salt": f"tenant {rng.randrange(3)}"} if kind == "tenant" else {}
            server.generate(self._tokens(1000 + rng.randrange(12), 700), 4, **salt)

    # ---- trouble ----

    def _flush(self) -> None:
        self.servers[self._rng.randrange(2)].post("/flush_cache")

    def _reload_weights(self) -> None:
        at = self._rng.randrange(2)
        self.servers[at].post(
            "/update_weights_from_disk", timeout_s=120, model_path=str(self._model)
        ).raise_for_status()

    def _kill_server(self) -> None:
        at = self._rng.randrange(2)
        self._up[at] = False
        for process in self.servers[at].processes():
            process.kill()
        self.servers[at].stop()
        self.servers[at] = self._server().wait_ready()
        self._up[at] = True

    # ---- what is left ----

    def _sample(self) -> None:
        while time.monotonic() < self._end:
            for name, process in self._processes():
                with contextlib.suppress(psutil.Error):
                    found = (process.num_fds(), process.num_threads(), process.memory_info().rss)
                    self.samples[name].append((time.monotonic(), *found))
            time.sleep(SAMPLE_S)

    def _processes(self) -> list[tuple[str, psutil.Process]]:
        found = []
        for n, server in enumerate(self.servers):
            found += [(f"server {n}, process {p.pid}", p) for p in server.processes()]
        with contextlib.suppress(psutil.Error):
            memory = psutil.Process(self.memory.process.pid)
            found += [(f"memory {p.pid}", p) for p in (memory, *memory.children())]
        return found

    def _settle(self) -> None:
        """Wait until all is idle, and look at what it holds."""
        deadline = time.monotonic() + 60
        while (left := self._held()) and time.monotonic() < deadline:
            time.sleep(0.5)
        self.faults += [f"left behind: {what}" for what in left]
        for n, server in enumerate(self.servers):
            text = server.log.read_text(errors="replace").lower()
            if "leak" in text or "traceback" in text:
                self.faults.append(f"server {n} complains: {server.log}")

    def _held(self) -> list[str]:
        held = []
        for n, server in enumerate(self.servers):
            smg = server.get("/server_info")["internal_states"][0]["smg"]
            for what in ("leases_held", "spills_waiting"):
                if smg[what]:
                    held.append(f"server {n}: {what} {smg[what]}")
            memory = smg["memory"]
            if memory is None:
                held.append(f"server {n}: no memory server")
                continue
            for what in ("leases", "pages_writing"):
                if memory[what]:
                    held.append(f"memory of server {n}: {what} {memory[what]}")
        return held

    def growth(self) -> dict[str, dict[str, float]]:
        """Of processes that lived through the last two thirds: descriptors and threads more, and MB
        an hour of resident memory."""
        found = {}
        for name, samples in self.samples.items():
            rows = np.array(samples, dtype=float)
            late = rows[len(rows) // 3 :]
            if len(late) < 12 or rows[-1, 0] < self._end - 4 * SAMPLE_S:
                continue
            slope = float(np.polyfit(late[:, 0], late[:, 3], 1)[0]) * 3600 / 1e6
            half = len(late) // 2
            more = np.median(late[half:], axis=0) - np.median(late[:half], axis=0)
            found[name] = {
                "fds": float(more[1]), "threads": float(more[2]), "mb_an_hour": slope,
                "minutes": (late[-1, 0] - late[0, 0]) / 60,
            }  # fmt: skip
        return found

    def close(self) -> None:
        for server in self.servers:
            server.stop()
        self.memory.stop()


def main() -> int:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT / "soak.json")
    options = parser.parse_args()
    console, folder = Console(), Path(tempfile.mkdtemp(prefix="smg-soak-", dir="/tmp"))
    soak = Soak(folder, options.minutes, options.seed, console)
    try:
        soak.run()
    finally:
        soak.close()
        shutil.rmtree(folder, ignore_errors=True)
    grown = soak.growth()
    faults = list(soak.faults)
    faults += [f"{name}: {g['fds']:+.0f} descriptors" for name, g in grown.items() if g["fds"] > 2]
    faults += [
        f"{name}: {g['threads']:+.0f} threads" for name, g in grown.items() if g["threads"] > 2
    ]
    result: dict[str, Any] = {
        "minutes": options.minutes, "done": dict(soak.done), "grown": grown, "faults": faults
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    console.print(result["done"])
    for name, g in grown.items():
        console.print(f"{name}: {g['mb_an_hour']:+.0f} MB an hour over {g['minutes']:.0f} minutes")
    for fault in faults:
        console.print(f"[red]{fault}")
    console.print(f"{len(faults)} faults; written to {options.out}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
