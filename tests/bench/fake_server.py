"""As much of SGLang's HTTP interface as a replay uses, without a model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading

from aiohttp import web


class FakeServer:
    """Streams answers after `delay_s`; says 500 to a prompt of one token id."""

    def __init__(self, model="no-model", delay_s=0.0):
        self.model, self.delay_s = str(model), delay_s
        self.bodies, self.flushed, self.most, self._running = [], 0, 0, 0

    @contextlib.contextmanager
    def running(self):
        """Its URL; served by a thread."""
        loop, started = asyncio.new_event_loop(), threading.Event()
        urls = []

        async def start():
            runner = web.AppRunner(self._application())
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            urls.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
            started.set()

        def serve():
            loop.run_until_complete(start())
            loop.run_forever()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        assert started.wait(10)
        try:
            yield urls[0]
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)

    def _application(self):
        application = web.Application()
        application.router.add_post("/generate", self._generate)
        application.router.add_post("/flush_cache", self._flush)
        application.router.add_get("/model_info", self._info)
        application.router.add_get("/server_info", self._info)
        return application

    async def _flush(self, _):
        self.flushed += 1
        return web.Response()

    async def _info(self, _):
        return web.json_response({"model_path": self.model, "internal_states": [{}]})

    async def _generate(self, http):
        body = await http.json()
        self.bodies.append(body)
        if len(body.get("input_ids", "xx")) == 1:
            return web.Response(status=500)
        self._running += 1
        self.most = max(self.most, self._running)
        response = web.StreamResponse()
        await response.prepare(http)
        await asyncio.sleep(self.delay_s)
        prompt = len(body["input_ids"]) if "input_ids" in body else len(body["text"].split())
        for n in range(1, body["sampling_params"]["max_new_tokens"] + 1):
            meta = {"completion_tokens": n, "cached_tokens": 0, "prompt_tokens": prompt}
            meta["cached_tokens_details"] = {"device": 1, "host": 2}
            event = {"meta_info": meta, "output_ids": [7] * n}
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self._running -= 1
        return response
