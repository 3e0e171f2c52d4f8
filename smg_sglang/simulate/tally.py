"""What is counted while a trace runs."""

from __future__ import annotations

import numpy as np

from smg_sglang.simulate.flight import Flight
from smg_sglang.simulate.settings import Settings
from smg_sglang.trace.request import Request


class Tally:
    """Token, FLOP and time sums over the requests."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.requests = self.refused = self.finished = 0
        self.input_tokens = self.output_tokens = self.refused_tokens = 0
        self.hit_tokens = {"device": 0, "host": 0, "storage": 0}
        self.prefill_flops = 0.0
        self.saved_flops = {"device": 0.0, "host": 0.0, "storage": 0.0}
        self.saved_s = {"device": 0.0, "host": 0.0, "storage": 0.0}
        self.loads = self.loaded_pages = 0
        self.ttft_s: list[float] = []

    def refuse(self, request: Request) -> None:
        """It can never fit on the device."""
        self.refused += 1
        self.refused_tokens += request.input_tokens

    def admit(self, flight: Flight) -> None:
        """It starts, with what was found for it."""
        page = self._settings.page_size
        prompt = flight.request.input_tokens
        self.requests += 1
        self.input_tokens += prompt
        device, host = flight.device_pages * page, flight.host_pages * page
        self.hit_tokens["device"] += device
        stored = min(flight.stored_pages, flight.host_pages) * page
        self.hit_tokens["host"] += host - stored
        self.hit_tokens["storage"] += stored
        self.loads += host > 0
        self.loaded_pages += flight.host_pages
        self._save(prompt, device, host, flight.host_pages, stored)

    def _save(self, prompt: int, device: int, host: int, pages: int, stored: int) -> None:
        """Against computing all of the prompt, on a device that has nothing else to do: a load
        hides behind the computation of the rest, as far as that is long enough."""
        model, settings = self._settings.model, self._settings
        self.prefill_flops += model.prefill_flops(0, prompt)
        self.saved_flops["device"] += model.prefill_flops(0, device)
        known = device + host - stored
        self.saved_flops["host"] += model.prefill_flops(device, known)
        self.saved_flops["storage"] += model.prefill_flops(known, device + host)
        self.saved_s["device"] += settings.compute_s(0, device)
        rest = settings.compute_s(device + host, prompt)
        exposed = max(settings.link_s(pages) - rest, 0.0)
        self.saved_s["host"] += settings.compute_s(device, known) - exposed
        fetched_s = settings.fetch_s(stored // settings.page_size)
        self.saved_s["storage"] += settings.compute_s(known, device + host) - fetched_s

    def first_token(self, flight: Flight, now_s: float) -> None:
        """Its prompt is computed."""
        self.ttft_s.append(now_s - flight.arrived_s)

    def finish(self, flight: Flight) -> None:
        """Its answer is complete."""
        self.finished += 1
        self.output_tokens += flight.request.output_tokens

    def ttft(self) -> dict[str, float]:
        """Seconds from arrival to first token."""
        times = np.array(self.ttft_s or [0.0])
        return {
            "mean": float(times.mean()),
            "p50": float(np.percentile(times, 50)),
            "p99": float(np.percentile(times, 99)),
        }
