"""A frontend backend that notes what each of its requests found in the cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.interpreter import StreamExecutor
from sglang.lang.ir import SglSamplingParams

#: What SmolLM2 and Qwen were tuned on. The frontend guesses from the model's path, and would take
#: a template of its own for a folder that it does not know.
TEMPLATE = "chatml"


@dataclass
class Counts:
    """Requests of one run. Appended to by the threads of all programs."""

    prompt_tokens: list[int] = field(default_factory=list)
    output_tokens: list[int] = field(default_factory=list)
    cached: list[dict[str, int]] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)

    def note(self, meta: dict[str, Any]) -> None:
        self.prompt_tokens.append(meta["prompt_tokens"])
        self.output_tokens.append(meta["completion_tokens"])
        details = meta.get("cached_tokens_details") or {"device": meta["cached_tokens"]}
        self.cached.append({k: v for k, v in details.items() if isinstance(v, int)})

    def share(self, tier: str) -> float:
        """Prompt tokens that a tier had, of all."""
        found = sum(cached.get(tier, 0) for cached in self.cached)
        return found / max(1, sum(self.prompt_tokens))


class CountingEndpoint(RuntimeEndpoint):
    """SGLang's own endpoint; `counts` is of the requests since `start`."""

    def __init__(self, url: str) -> None:
        super().__init__(url, chat_template_name=TEMPLATE)
        self.counts = Counts()

    def start(self) -> None:
        self.counts = Counts()

    def generate(
        self, s: StreamExecutor, sampling_params: SglSamplingParams
    ) -> tuple[str, dict[str, Any]]:
        text, meta = super().generate(s, sampling_params)
        self.counts.note(meta)
        return text, meta

    def generate_stream(
        self, s: StreamExecutor, sampling_params: SglSamplingParams
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        began, meta = time.perf_counter(), None
        for text, meta in super().generate_stream(s, sampling_params):
            if began:
                self.counts.ttft_s.append(time.perf_counter() - began)
                began = 0.0
            yield text, meta
        if meta is not None:
            self.counts.note(meta)

    def _generate_http_request(self, s: StreamExecutor, data: dict[str, Any]) -> Any:
        """What `select` sends: the common prefix, then all choices."""
        answers = super()._generate_http_request(s, data)
        for answer in answers if isinstance(answers, list) else [answers]:
            self.counts.note(answer["meta_info"])
        return answers
