"""The class that SGLang's data-parallel controller process runs in place of its own."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

from sglang.srt.managers import data_parallel_controller as stock

from smg_sglang.engine.options.record import carried
from smg_sglang.engine.split.shell import PhaseShell


class PhaseDataParallelController(stock.DataParallelController):  # type: ignore[misc]
    """SGLang's controller, or the phase controller where the split is on."""

    def __init__(
        self,
        server_args: Any,
        port_args: Any,
        run_scheduler_process_func: Callable[..., None],
        prelaunched_schedulers: Any = None,
    ) -> None:
        self._phases: PhaseShell | None = None
        if "plans" not in carried(server_args):
            super().__init__(
                server_args, port_args, run_scheduler_process_func, prelaunched_schedulers
            )
            return
        # A worker that hits an exception tells its parent so; we notice its end by ourselves.
        signal.signal(signal.SIGQUIT, lambda signum, frame: None)
        self._phases = PhaseShell(server_args, port_args, run_scheduler_process_func)
        self._phases.start()
        # What `run_data_parallel_controller_process` reads.
        self.scheduler_procs: list[Any] = []
        self.local_kv_event_sources: list[Any] = []

    def get_init_info(self) -> dict[str, Any]:
        """What the tokenizer process is told of all workers: the limits of the decode workers."""
        if self._phases is None:
            info: dict[str, Any] = super().get_init_info()
            return info
        infos = [link.init_info for link in self._phases.links if not link.is_prefill]
        smallest = min(infos, key=lambda info: info["max_req_input_len"])
        return {
            "max_total_num_tokens": smallest["max_total_num_tokens"],
            "max_req_input_len": smallest["max_req_input_len"],
            "startup_time": smallest.get("startup_time"),
        }

    def event_loop(self) -> None:
        """Serve; returns only after a graceful stop."""
        if self._phases is None:
            super().event_loop()
            return
        try:
            self._phases.run()
        finally:
            self._phases.close()
