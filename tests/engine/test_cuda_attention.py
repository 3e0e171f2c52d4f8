"""The CUDA backend through SGLang's interface, dry: SGLang's own half and FlashInfer's kernels are
stand-ins, and tensors are on the CPU."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from smg_sglang.attention.host import HostRun
from smg_sglang.engine import attention_backend, cuda_attention, flags
from smg_sglang.engine import streams as stream_table
from smg_sglang.errors import ConfigError
from tests.attention import fake_flashinfer
from tests.attention.reference import TOLERANCE, reference
from tests.attention.test_host import LAYERS
from tests.attention.test_host import World as Keys

HEADS, KV_HEADS, DIM, PAGE, DTYPE = 4, 2, 64, 4, torch.bfloat16


class Stock:
    """What is called of SGLang's own backend."""

    def __init__(self):
        self.calls = []

    def install(self, monkeypatch):
        def init(backend, model_runner, **options):
            backend.num_wrappers = 1
            backend.kv_index_translator = SimpleNamespace(reads_are_translated=False)
            backend.workspace_buffer = torch.empty(16, dtype=torch.uint8)
            backend.req_to_token_pool = model_runner.req_to_token_pool
            backend.token_to_kv_pool = model_runner.token_to_kv_pool

        monkeypatch.setattr(FlashInferAttnBackend, "__init__", init)
        for name in ("init_forward_metadata", "forward_extend", "forward_decode"):
            monkeypatch.setattr(FlashInferAttnBackend, name, self._recorded(name))

    def _recorded(self, name):
        def call(backend, *args, **kwargs):
            self.calls.append(name)
            return name

        return call


class World:
    """Requests (host pages, on the device, new), as a batch of SGLang's."""

    def __init__(self, requests, mode):
        self.keys = Keys(requests, heads=(HEADS, KV_HEADS), dims=(DIM, DIM), dtype=DTYPE,
                         page_size=PAGE)  # fmt: skip
        self.requests = requests
        self.streams = Table(self.keys)
        tokens = [pages * PAGE + tail for pages, tail, _ in requests]
        table = torch.full((len(requests) + 2, max(tokens) + 5), PAGE - 1, dtype=torch.int32)
        for row, (slots, length) in enumerate(zip(self.keys.slots, tokens, strict=True)):
            table[row + 2, length - len(slots) : length] = slots
        self.pool = Pool(self.keys)
        self.runner = SimpleNamespace(
            model_config=SimpleNamespace(head_dim=DIM, v_head_dim=DIM),
            dtype=DTYPE,
            kv_cache_dtype=DTYPE,
            req_to_token_pool=SimpleNamespace(req_to_token=table),
            token_to_kv_pool=self.pool,
        )
        new = [count for _, _, count in requests]
        self.batch = SimpleNamespace(
            forward_mode=mode,
            rids=[f"r{number}" for number in range(len(requests))],
            req_pool_indices=torch.arange(len(requests)) + 2,
            seq_lens_cpu=torch.tensor(tokens),
            extend_seq_lens_cpu=new,
            out_cache_loc=self.new_slots(),
            out_cache_loc_is_physical=True,
        )

    def new_slots(self):
        slots = [mine[len(mine) - new :] for mine, (_, _, new) in zip(self.keys.slots, self.requests, strict=True)]  # fmt: skip
        return torch.cat(slots).long()


class Pool:
    """SGLang's KV pool as far as the backend uses it."""

    def __init__(self, keys):
        self.keys, self.written = keys, []

    def get_kv_buffer(self, layer):
        return self.keys.k[layer], self.keys.v[layer]

    def set_kv_buffer(self, layer, place, k, v):
        self.written.append(layer.layer_id)
        self.keys.k[layer.layer_id][place.loc] = k
        self.keys.v[layer.layer_id][place.loc] = v


class Table:
    """The streams: every request with host pages is one."""

    def __init__(self, keys):
        self.reader = keys.reader
        self.found = {
            f"r{number}": SimpleNamespace(
                table=self, runs=runs, resident_from=sum(run.tokens for run in runs)
            )
            for number, runs in enumerate(keys.host)
            if runs
        }

    def by_rid(self, rid):
        return self.found.get(rid)


def make_layer(number=0, **changes):
    fields = {
        "layer_id": number,
        "tp_q_head_num": HEADS,
        "head_dim": DIM,
        "scaling": DIM**-0.5,
        "logit_cap": 0.0,
        "sliding_window_size": -1,
        "is_cross_attention": False,
        "attn_type": AttentionType.DECODER,
        "xai_temperature_len": -1,
    }
    return SimpleNamespace(**(fields | changes))


@pytest.fixture
def stock(monkeypatch):
    fake_flashinfer.install(monkeypatch)
    stock = Stock()
    stock.install(monkeypatch)
    return stock


@pytest.fixture
def make_world(monkeypatch):
    made = []

    def make(requests, mode=ForwardMode.EXTEND):
        world = World(requests, mode)
        made.append(world.keys)
        streams = world.streams if world.streams.found else None
        monkeypatch.setattr(stream_table, "active", lambda: streams)
        return world

    yield make
    for keys in made:
        keys.close()


def attend(backend, world, layer):
    """One layer; (what the backend says, the queries)."""
    torch.manual_seed(layer.layer_id)
    tokens = sum(count for _, _, count in world.requests)
    q = torch.randn(tokens, HEADS * DIM).to(DTYPE)
    k, v = (torch.randn(tokens, KV_HEADS, DIM).to(DTYPE) for _ in range(2))
    decode = world.batch.forward_mode.is_decode()
    forward = backend.forward_decode if decode else backend.forward_extend
    return forward(q, k, v, layer, world.batch), q.view(tokens, HEADS, DIM)


MIXED = [(3, 7, 1), (5, 20, 12), (0, 14, 4)]


@pytest.mark.parametrize(
    ("requests", "mode"),
    [
        (MIXED, ForwardMode.EXTEND),
        ([(3, 7, 1), (0, 5, 1), (2, 1, 1)], ForwardMode.DECODE),
        ([(7, 9, 9)], ForwardMode.EXTEND),
    ],
    ids=["extend", "decode", "one"],
)
def test_a_batch_with_streams_attends_all_of_each_context(stock, make_world, requests, mode):
    world = make_world(requests, mode)
    backend = cuda_attention.CudaAttentionBackend(world.runner)
    new = [count for _, _, count in requests]
    for _ in range(2):
        backend.init_forward_metadata(world.batch)
        for number in range(LAYERS):
            out, q = attend(backend, world, make_layer(number))
            rows = zip(q.split(new), out.view(len(q), HEADS, DIM).split(new), strict=True)
            for request, (queries, got) in enumerate(rows):
                k, v = world.keys.whole(request, number)
                want = reference(queries, k, v, scale=DIM**-0.5, causal=True).out
                torch.testing.assert_close(
                    got.double(), want, atol=TOLERANCE[DTYPE], rtol=TOLERANCE[DTYPE]
                )
    assert world.pool.written == [*range(LAYERS)] * 2
    assert not stock.calls


def test_a_batch_without_streams_is_sglangs_own(stock, make_world):
    world = make_world([(0, 9, 3)])
    backend = cuda_attention.CudaAttentionBackend(world.runner)
    backend.init_forward_metadata(world.batch)
    assert attend(backend, world, make_layer(sliding_window_size=8))[0] == "forward_extend"
    world.batch.forward_mode = ForwardMode.DECODE
    assert attend(backend, world, make_layer())[0] == "forward_decode"
    assert stock.calls == ["init_forward_metadata", "forward_extend", "forward_decode"]
    assert not world.pool.written


def test_only_batches_without_streams_may_run_in_graphs(stock, make_world):
    backend = cuda_attention.CudaAttentionBackend(make_world([(0, 9, 3)]).runner)
    streamed = make_world(MIXED)
    assert not backend.can_run_graph(streamed.batch)
    streamed.batch.rids = ["r2", "of others"]
    assert backend.can_run_graph(streamed.batch)
    # What SGLang runs to warm up or to capture has no requests.
    streamed.batch.rids = None
    assert backend.can_run_graph(streamed.batch)


def test_a_batch_that_was_not_planned_here_is_sglangs_own(stock, make_world):
    """A captured graph calls the layers with a batch of its own, after any other."""
    world = make_world(MIXED)
    backend = cuda_attention.CudaAttentionBackend(world.runner)
    backend.init_forward_metadata(world.batch)
    world.batch = SimpleNamespace(forward_mode=ForwardMode.EXTEND)
    assert attend(backend, world, make_layer())[0] == "forward_extend"


def test_what_is_on_the_device_too_is_read_there(stock, make_world):
    """The newest host pages of a stream may still have their slots."""
    world = make_world([(4, 6, 2)])
    keys, stream, begin, end = world.keys, world.streams.found["r0"], 2 * PAGE, 4 * PAGE
    whole = [keys.whole(0, layer) for layer in range(LAYERS)]
    first = keys.k[0].shape[0]
    for layer, (k, v) in enumerate(whole):
        keys.k[layer] = torch.cat([keys.k[layer], k[begin:end]])
        keys.v[layer] = torch.cat([keys.v[layer], v[begin:end]])
    slots = torch.arange(first, first + end - begin, dtype=torch.int32)
    world.runner.req_to_token_pool.req_to_token[2, begin:end] = slots
    pages = [(run.arena, offset) for run in stream.runs for offset in run.offsets][:2]
    stream.runs = [HostRun(arena, np.array([offset]), PAGE) for arena, offset in pages]
    stream.resident_from = begin
    backend = cuda_attention.CudaAttentionBackend(world.runner)
    backend.init_forward_metadata(world.batch)
    q = torch.randn(2, HEADS * DIM).to(DTYPE)
    for layer, (k, v) in enumerate(whole):
        out = backend.forward_extend(q, None, None, make_layer(layer), world.batch)
        want = reference(q.view(2, HEADS, DIM), k, v, scale=DIM**-0.5, causal=True).out
        torch.testing.assert_close(out.view(2, HEADS, DIM).double(), want, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sliding_window_size": 128}, "sliding window"),
        ({"is_cross_attention": True}, "not causal"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "not causal"),
        ({"xai_temperature_len": 8}, "temperature"),
    ],
)
def test_what_a_streamed_layer_cannot_have_is_refused_by_name(stock, make_world, changes, named):
    world = make_world(MIXED)
    backend = cuda_attention.CudaAttentionBackend(world.runner)
    backend.init_forward_metadata(world.batch)
    with pytest.raises(ConfigError, match=named):
        attend(backend, world, make_layer(**changes))


def test_speculative_passes_are_refused(stock, make_world):
    world = make_world(MIXED, ForwardMode.TARGET_VERIFY)
    backend = cuda_attention.CudaAttentionBackend(world.runner)
    with pytest.raises(ConfigError, match="TARGET_VERIFY"):
        backend.init_forward_metadata(world.batch)


@pytest.mark.parametrize(
    ("dtype", "kv"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float8_e4m3fn)]
)
def test_other_dtypes_are_refused_when_the_server_starts(stock, dtype, kv):
    runner = SimpleNamespace(dtype=dtype, kv_cache_dtype=kv)
    with pytest.raises(ConfigError, match="bfloat16 or float16"):
        cuda_attention.CudaAttentionBackend(runner)


@pytest.mark.parametrize("windows", [True, False])
def test_models_of_another_kind_are_refused_when_the_server_starts(stock, windows, monkeypatch):
    runner = runner_with({"stream_context": True})
    if windows:
        init = FlashInferAttnBackend.__init__

        def with_windows(backend, *args, **kwargs):
            init(backend, *args, **kwargs)
            backend.num_wrappers = 2

        monkeypatch.setattr(FlashInferAttnBackend, "__init__", with_windows)
    else:
        runner.model_config.v_head_dim = DIM // 2
    with pytest.raises(ConfigError, match="no sliding windows"):
        cuda_attention.CudaAttentionBackend(runner)


def runner_with(config, **more):
    fields = {"device": "cuda", "use_mla_backend": False, "init_new_workspace": False}
    fields |= {"dtype": DTYPE, "kv_cache_dtype": DTYPE}
    fields |= {"model_config": SimpleNamespace(head_dim=DIM, v_head_dim=DIM)}
    fields |= {"req_to_token_pool": None, "token_to_kv_pool": None}
    args = SimpleNamespace(**{flags.ATTRIBUTE: {"config": config}})
    return SimpleNamespace(server_args=args, **(fields | more))


def test_the_name_gives_sglangs_own_backend_unless_contexts_are_streamed(stock, monkeypatch):
    from sglang.srt.layers.attention import attention_registry

    monkeypatch.setitem(attention_registry.ATTENTION_BACKENDS, "flashinfer", lambda runner: "own")
    assert attention_backend.create(runner_with({})) == "own"
    backend = attention_backend.create(runner_with({"stream_context": True}))
    assert type(backend) is cuda_attention.CudaAttentionBackend
    with pytest.raises(ConfigError, match="MLA"):
        attention_backend.create(runner_with({"stream_context": True}, use_mla_backend=True))
