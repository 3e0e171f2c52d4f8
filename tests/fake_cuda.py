"""CUDA streams and events for a machine without CUDA, which know what comes after what.

Copies and kernels run at once, on CPU tensors, so bytes never show a race. `FakeCuda` finds races
instead: each stream, and the CPU, has a vector clock, events carry it from one to another, and two
accesses to one thing of which neither is ordered behind the other fail the test, as do their marks.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from contextlib import contextmanager

import torch


class Clock(dict):
    """How much of each timeline lies behind a point."""

    def join(self, other):
        for name, time in other.items():
            self[name] = max(self.get(name, 0), time)

    def has(self, point):
        name, time = point
        return self.get(name, 0) >= time


class Stream:
    def __init__(self, cuda, name):
        self.cuda, self.name, self.clock = cuda, name, Clock()

    def enqueue(self):
        """Put something on the stream; its point in time."""
        self.clock.join(self.cuda.cpu)  # what the CPU knows to be done is done
        self.clock[self.name] = self.clock.get(self.name, 0) + 1
        return self.name, self.clock[self.name]

    def wait_event(self, event):
        self.enqueue()
        self.clock.join(event.clock)

    def wait_stream(self, other):
        self.enqueue()
        self.clock.join(other.clock)

    def synchronize(self):
        self.enqueue()
        self.cuda.cpu.join(self.clock)


class Event:
    def __init__(self, cuda, **_options):
        self.cuda, self.clock = cuda, Clock()
        self.ms = None

    def record(self, stream=None):
        stream = stream or self.cuda.current
        stream.enqueue()
        self.clock = Clock(stream.clock)
        self.ms = self.cuda.ms

    def elapsed_time(self, end):
        assert all(self.cuda.cpu.has(point) for point in end.clock.items()), "not reached yet"
        return end.ms - self.ms

    def synchronize(self):
        self.cuda.cpu.join(self.clock)
        self.cuda.waits += 1


class Driver:
    """cudart: registers up to a limit, and nothing twice."""

    def __init__(self, limit=1 << 60):
        self.registered = {}
        self.limit = limit

    def cudaHostRegister(self, address, size, flags):
        assert not any(
            at < address + size and address < at + n for at, n in self.registered.items()
        )
        if sum(self.registered.values()) + size > self.limit:
            return 2
        self.registered[address] = size
        return 0

    def cudaHostUnregister(self, address):
        del self.registered[address]


def set_device(device):
    """As strict as torch's."""
    if device.index is None:
        raise ValueError(f"Expected a torch.device with a specified index, but got {device}")


class FakeCuda:
    """What `torch.cuda` is while it is installed. One device.

    Attributes:
        cpu: what the CPU has waited for.
        waits: how often it waited for an event.
        ms: time on the device, in milliseconds; stands still unless a test lets it pass.
        races: pairs of accesses without an order between them.
    """

    def __init__(self):
        self.cpu = Clock()
        self.waits = 0
        self.ms = 0.0
        self.races = []
        self.driver = Driver()
        self._local = threading.local()
        self._default = Stream(self, "default")
        self._streams = 0
        self._lock = threading.RLock()
        self._written = {}
        self._read = defaultdict(list)

    @property
    def current(self):
        return getattr(self._local, "stream", self._default)

    def stream(self, name=None):
        with self._lock:
            self._streams += 1
            return Stream(self, name or f"stream {self._streams}")

    @contextmanager
    def on(self, stream):
        before, self._local.stream = self.current, stream
        try:
            yield
        finally:
            self._local.stream = before

    def read(self, thing):
        """Something on the current stream reads it."""
        with self._lock:
            stream = self.current
            point = stream.enqueue()
            self._ordered(stream, "read", thing, self._written.get(thing))
            self._read[thing].append(point)

    def write(self, thing):
        """Something on the current stream writes it."""
        with self._lock:
            stream = self.current
            point = stream.enqueue()
            for earlier in [self._written.get(thing), *self._read.pop(thing, ())]:
                self._ordered(stream, "write", thing, earlier)
            self._written[thing] = point

    def _ordered(self, stream, what, thing, earlier):
        if earlier is not None and not stream.clock.has(earlier):
            self.races.append((what, thing, stream.name, earlier))

    def install(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "Stream", lambda *_: self.stream())
        monkeypatch.setattr(torch.cuda, "Event", lambda **options: Event(self, **options))
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: self.current)
        monkeypatch.setattr(torch.cuda, "set_device", set_device)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self.driver)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        return self
