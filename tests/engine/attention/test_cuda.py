"""The CUDA backends through SGLang's interface, dry: SGLang's own half and FlashInfer's kernels are
stand-ins, and tensors are on the CPU."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend
from sglang.srt.layers.attention.flashinfer_mla_backend import FlashInferMLAAttnBackend
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.models.deepseek_common import attention_backend_handler as handlers
from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import (
    AttnForwardMethod,
)
from sglang.srt.plugins.hook_registry import HookType

from smg_sglang.attention.host import HostRun
from smg_sglang.engine.attention import backend as attention_backend
from smg_sglang.engine.attention import cuda as cuda_attention
from smg_sglang.engine.options.record import ATTRIBUTE
from smg_sglang.engine.seams import plugin
from smg_sglang.engine.streams import table as stream_table
from smg_sglang.errors import ConfigError
from tests.attention import fake_flashinfer
from tests.attention.reference import TOLERANCE, reference
from tests.attention.test_host import LAYERS
from tests.attention.test_host import World as Keys

PAGE = 4


@dataclass(frozen=True)
class Model:
    """What a backend is for, and the classes it is to have: ours and SGLang's."""

    heads: tuple[int, int]
    dims: tuple[int, int]
    dtype: torch.dtype
    backend: type
    stock: type
    mla: bool = False

    @property
    def name(self):
        """SGLang's for its own backend."""
        return "triton" if self.stock is TritonAttnBackend else "flashinfer"


PAGED = Model((4, 2), (64, 64), torch.bfloat16, cuda_attention.PagedBackend, FlashInferAttnBackend)
LATENT = Model(
    (16, 1),
    (576, 512),
    torch.bfloat16,
    cuda_attention.LatentBackend,
    FlashInferMLAAttnBackend,
    True,
)
FP32 = Model((4, 2), (64, 64), torch.float32, cuda_attention.ExactBackend, TritonAttnBackend)
FP32_MLA = Model(
    (4, 1), (96, 64), torch.float32, cuda_attention.ExactBackend, TritonAttnBackend, True
)
ODD_MLA = Model(
    (16, 1), (544, 512), torch.bfloat16, cuda_attention.ExactBackend, TritonAttnBackend, True
)
MODELS = {"GQA": PAGED, "MLA": LATENT, "GQA, fp32": FP32, "MLA, fp32": FP32_MLA, "odd": ODD_MLA}
models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


class Stock:
    """What is called of SGLang's own backends."""

    def __init__(self):
        self.calls = []

    def install(self, monkeypatch):
        for stock in (FlashInferAttnBackend, FlashInferMLAAttnBackend, TritonAttnBackend):
            self._install(monkeypatch, stock)

    def _install(self, monkeypatch, stock):
        signature = inspect.signature(stock.__init__)

        def init(backend, *args, **options):
            model_runner = signature.bind(backend, *args, **options).arguments["model_runner"]
            backend.kv_index_translator = SimpleNamespace(reads_are_translated=False)
            backend.req_to_token_pool = model_runner.req_to_token_pool
            backend.token_to_kv_pool = model_runner.token_to_kv_pool
            if stock is not TritonAttnBackend:
                backend.workspace_buffer = torch.empty(16, dtype=torch.uint8)
            if stock is FlashInferAttnBackend:
                backend.num_wrappers = 1

        monkeypatch.setattr(stock, "__init__", init)
        for name in ("init_forward_metadata", "forward_extend", "forward_decode"):
            monkeypatch.setattr(stock, name, self._recorded(stock, name))

    def _recorded(self, stock, name):
        signature = inspect.signature(getattr(stock, name))

        def call(backend, *args, **kwargs):
            signature.bind(backend, *args, **kwargs)
            self.calls.append(name)
            return name

        return call


class World:
    """Requests (host pages, on the device, new), as a batch of SGLang's."""

    def __init__(self, model, requests, mode):
        self.model = model
        self.keys = Keys(requests, heads=model.heads, dims=model.dims, dtype=model.dtype,
                         page_size=PAGE, mla=model.mla)  # fmt: skip
        self.requests = requests
        self.streams = Table(self.keys)
        tokens = [pages * PAGE + tail for pages, tail, _ in requests]
        table = torch.full((len(requests) + 2, max(tokens) + 5), PAGE - 1, dtype=torch.int32)
        for row, (slots, length) in enumerate(zip(self.keys.slots, tokens, strict=True)):
            table[row + 2, length - len(slots) : length] = slots
        self.pool = Pool(self.keys)
        self.runner = runner_for(
            model,
            device="cpu",
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
        if not self.keys.mla:
            self.keys.v[layer.layer_id][place.loc] = v

    def set_mla_kv_buffer(self, *args):
        call = inspect.signature(MLATokenToKVPool.set_mla_kv_buffer).bind(self, *args).arguments
        parts = torch.cat([call["cache_k_nope"], call["cache_k_rope"]], -1)
        self.set_kv_buffer(call["layer"], call["loc_info"], parts, None)


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


def runner_for(model, config=None, **more):
    """A model runner of SGLang's."""
    fields = {"device": "cuda", "init_new_workspace": False, "use_mla_backend": model.mla}
    fields |= {"dtype": model.dtype, "kv_cache_dtype": model.dtype}
    fields |= {"req_to_token_pool": None, "token_to_kv_pool": None}
    dim, v_dim = model.dims
    sizes = {"head_dim": dim, "v_head_dim": v_dim, "num_attention_heads": model.heads[0]}
    if model.mla:
        # Before the projections are absorbed; that is not what the pool has.
        sizes |= {"head_dim": 192, "v_head_dim": 128}
        sizes |= {"kv_lora_rank": v_dim, "qk_rope_head_dim": dim - v_dim}
    sizes |= {"get_num_kv_heads": lambda tensor_parallel_size: model.heads[1]}
    args = SimpleNamespace(**{ATTRIBUTE: {"config": config or {}}})
    return SimpleNamespace(
        server_args=args, model_config=SimpleNamespace(**sizes), **(fields | more)
    )


def make_layer(model, number=0, **changes):
    fields = {
        "layer_id": number,
        "tp_q_head_num": model.heads[0],
        "tp_k_head_num": model.heads[1],
        "head_dim": model.dims[0],
        "v_head_dim": model.dims[1],
        "scaling": model.dims[0] ** -0.5,
        "logit_cap": 0.0,
        "sliding_window_size": -1,
        "is_cross_attention": False,
        "attn_type": AttentionType.DECODER,
        "xai_temperature_len": -1,
    }
    return SimpleNamespace(**(fields | changes))


@pytest.fixture
def ranks(monkeypatch):
    """How many there are, in a list to be changed."""
    ranks = [1]
    parallel = lambda: SimpleNamespace(attn_tp_size=ranks[0])  # noqa: E731
    monkeypatch.setattr(cuda_attention, "get_parallel", parallel)
    return ranks


@pytest.fixture
def stock(monkeypatch, ranks):
    fake_flashinfer.install(monkeypatch)
    stock = Stock()
    stock.install(monkeypatch)
    return stock


@pytest.fixture
def make_world(monkeypatch):
    made = []

    def make(requests, mode=ForwardMode.EXTEND, model=PAGED):
        world = World(model, requests, mode)
        made.append(world.keys)
        streams = world.streams if world.streams.found else None
        monkeypatch.setattr(stream_table, "active", lambda: streams)
        return world

    yield make
    for keys in made:
        keys.close()


def attend(backend, world, layer, *, in_two=False):
    """One layer; (what the backend says, the queries). in_two: rope dimensions apart (MLA)."""
    torch.manual_seed(layer.layer_id)
    model, tokens = world.model, sum(count for _, _, count in world.requests)
    (heads, kv_heads), (dim, v_dim), dtype = model.heads, model.dims, model.dtype
    q = torch.randn(tokens, heads, dim).to(dtype)
    k = torch.randn(tokens, kv_heads, dim).to(dtype)
    v = k[..., :v_dim] if model.mla else torch.randn(tokens, kv_heads, v_dim).to(dtype)
    decode = world.batch.forward_mode.is_decode()
    forward = backend.forward_decode if decode else backend.forward_extend
    if in_two:
        ropes = {"q_rope": q[..., v_dim:], "k_rope": k[..., v_dim:]}
        return forward(q[..., :v_dim], v, v, layer, world.batch, **ropes), q
    return forward(q.view(tokens, -1), k, v, layer, world.batch), q


def assert_attends_all(world, out, q, layer):
    """Of each request's context, causally."""
    model, new = world.model, [count for _, _, count in world.requests]
    rows = zip(q.split(new), out.view(*q.shape[:2], -1).split(new), strict=True)
    for request, (queries, got) in enumerate(rows):
        k, v = world.keys.whole(request, layer)
        want = reference(queries, k, v, scale=model.dims[0] ** -0.5, causal=True).out
        tolerance = TOLERANCE[model.dtype]
        torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


MIXED = [(3, 7, 1), (5, 20, 12), (0, 14, 4)]
BATCHES = {
    "extend": (MIXED, ForwardMode.EXTEND),
    "decode": ([(3, 7, 1), (0, 5, 1), (2, 1, 1)], ForwardMode.DECODE),
    "one": ([(7, 9, 9)], ForwardMode.EXTEND),
}


@models
@pytest.mark.parametrize(("requests", "mode"), BATCHES.values(), ids=BATCHES)
def test_a_batch_with_streams_attends_all_of_each_context(stock, make_world, model, requests, mode):
    world = make_world(requests, mode, model)
    backend = cuda_attention.create(world.runner)
    for _ in range(2):
        backend.init_forward_metadata(world.batch)
        for number in range(LAYERS):
            out, q = attend(backend, world, make_layer(model, number))
            assert_attends_all(world, out, q, number)
    assert world.pool.written == [*range(LAYERS)] * 2
    assert not stock.calls


@pytest.mark.parametrize("model", [LATENT, FP32_MLA], ids=["MLA", "MLA, fp32"])
@pytest.mark.parametrize(("requests", "mode"), BATCHES.values(), ids=BATCHES)
def test_latents_may_come_with_their_rope_dimensions_apart(
    stock, make_world, model, requests, mode
):
    world = make_world(requests, mode, model)
    backend = cuda_attention.create(world.runner)
    backend.init_forward_metadata(world.batch)
    for number in range(LAYERS):
        out, q = attend(backend, world, make_layer(model, number), in_two=True)
        assert_attends_all(world, out, q, number)
    assert world.pool.written == [*range(LAYERS)]


@models
def test_a_batch_without_streams_is_sglangs_own(stock, make_world, model):
    world = make_world([(0, 9, 3)], model=model)
    backend = cuda_attention.create(world.runner)
    backend.init_forward_metadata(world.batch)
    layer = make_layer(model, sliding_window_size=8)
    in_two = model is LATENT
    assert attend(backend, world, layer, in_two=in_two)[0] == "forward_extend"
    world.batch.forward_mode = ForwardMode.DECODE
    assert attend(backend, world, make_layer(model), in_two=in_two)[0] == "forward_decode"
    assert stock.calls == ["init_forward_metadata", "forward_extend", "forward_decode"]
    assert not world.pool.written


def test_a_stream_that_is_all_on_the_device_is_sglangs_own(stock, make_world):
    """In its first chunk, or where the device has kept all of it: graphs can compute it, and MLA's
    prompt is expanded as any other."""
    world = make_world([(2, 9, 3)], model=LATENT)
    world.streams.found["r0"].resident_from = 0
    backend = cuda_attention.create(world.runner)
    backend.init_forward_metadata(world.batch)
    assert backend.can_run_graph(world.batch)
    assert stock.calls == ["init_forward_metadata"]


@models
def test_models_go_by_sglangs_name_but_for_batches_that_read_host_memory(stock, make_world, model):
    batch = (world := make_world(MIXED, model=model)).batch
    backend = cuda_attention.create(world.runner)
    # As SGLang does with what --attention-backend says.
    backend.prefill_attention_backend_str = backend.decode_attention_backend_str = "smg"

    def names():
        return backend.prefill_attention_backend_str, backend.decode_attention_backend_str

    # Graphs are captured before any batch comes.
    assert names() == (model.name, model.name)
    for rids, name in ((batch.rids, "smg"), (["r2"], model.name), (batch.rids, "smg")):
        batch.rids = rids
        backend.init_forward_metadata(batch)
        assert names() == (name, name)


@pytest.fixture
def dispatched(monkeypatch):
    """How SGLang's DeepSeek computes a batch, and the name it goes by."""
    from sglang.srt.models import deepseek_v2

    def dispatch(backend, batch):
        monkeypatch.setattr(deepseek_v2, "get_attn_backend", lambda: backend)
        monkeypatch.setattr(deepseek_v2, "attention_backends", lambda: ("smg", "smg"))
        attn = SimpleNamespace(
            flashinfer_mla_disable_ragged=False,
            qk_rope_head_dim=64,
            chunked_prefix_cache_threshold=8192,
            disable_chunked_prefix_cache=False,
        )
        method = deepseek_v2.DeepseekV2AttentionMLA.dispatch_attn_forward_method(attn, batch)
        return method, attn.current_attention_backend

    monkeypatch.setattr(handlers, "is_cp_active", lambda batch: False)
    return dispatch


@pytest.mark.parametrize("prefix", [0, 5])
def test_latents_in_host_memory_are_attended_by_queries_that_absorb(
    stock, make_world, dispatched, prefix
):
    """While prompts of others are expanded, as under FlashInfer's name."""
    world = make_world(MIXED, model=LATENT)
    batch, backend = world.batch, cuda_attention.create(world.runner)
    batch.get_max_chunk_capacity = lambda: 1 << 17
    batch.extend_prefix_lens_cpu = [prefix] * len(MIXED)
    backend.init_forward_metadata(batch)
    assert dispatched(backend, batch) == (AttnForwardMethod.MLA, "smg")
    batch.rids = ["r2", "of", "others"]
    backend.init_forward_metadata(batch)
    expanded = AttnForwardMethod.MLA if prefix else AttnForwardMethod.MHA_ONE_SHOT
    assert dispatched(backend, batch) == (expanded, "flashinfer")
    batch.forward_mode = ForwardMode.DECODE
    assert dispatched(backend, batch) == (AttnForwardMethod.MLA, "flashinfer")


def test_keys_that_were_expanded_from_latents_are_refused(stock, make_world):
    world = make_world(MIXED, model=LATENT)
    backend = cuda_attention.create(world.runner)
    backend.init_forward_metadata(world.batch)
    tokens = sum(count for _, _, count in MIXED)
    k, v = torch.zeros(tokens, 16, 192), torch.zeros(tokens, 16, 128)
    layer = make_layer(LATENT, tp_k_head_num=16, head_dim=192, v_head_dim=128)
    with pytest.raises(ConfigError, match="expanded from latents"):
        backend.forward_extend(k, k, v, layer, world.batch, save_kv_cache=False)


def test_only_batches_that_read_host_memory_may_not_run_in_graphs(stock, make_world):
    backend = cuda_attention.create(make_world([(0, 9, 3)]).runner)
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
    backend = cuda_attention.create(world.runner)
    backend.init_forward_metadata(world.batch)
    world.batch = SimpleNamespace(forward_mode=ForwardMode.EXTEND)
    assert attend(backend, world, make_layer(PAGED))[0] == "forward_extend"


@models
def test_what_is_on_the_device_too_is_read_there(stock, make_world, model):
    """The newest host pages of a stream may still have their slots."""
    world = make_world([(4, 6, 2)], model=model)
    keys, stream, begin, end = world.keys, world.streams.found["r0"], 2 * PAGE, 4 * PAGE
    whole = [keys.whole(0, layer) for layer in range(LAYERS)]
    first = keys.k[0].shape[0]
    for layer, (k, v) in enumerate(whole):
        keys.k[layer] = torch.cat([keys.k[layer], k[begin:end]])
        keys.v[layer] = torch.cat([keys.v[layer], v[begin:end]])
        if model.mla:
            keys.v[layer] = keys.k[layer][..., : model.dims[1]]
    slots = torch.arange(first, first + end - begin, dtype=torch.int32)
    world.runner.req_to_token_pool.req_to_token[2, begin:end] = slots
    pages = [(run.arena, offset) for run in stream.runs for offset in run.offsets][:2]
    stream.runs = [HostRun(arena, np.array([offset]), PAGE) for arena, offset in pages]
    stream.resident_from = begin
    backend = cuda_attention.create(world.runner)
    backend.init_forward_metadata(world.batch)
    q = torch.randn(2, model.heads[0], model.dims[0]).to(model.dtype)
    for layer, (k, v) in enumerate(whole):
        out = backend.forward_extend(
            q.view(2, -1), None, None, make_layer(model, layer), world.batch
        )
        want = reference(q, k, v, scale=model.dims[0] ** -0.5, causal=True).out
        torch.testing.assert_close(
            out.view(2, model.heads[0], -1).double(), want, atol=3e-2, rtol=3e-2
        )


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
    backend = cuda_attention.create(world.runner)
    backend.init_forward_metadata(world.batch)
    with pytest.raises(ConfigError, match=named):
        attend(backend, world, make_layer(PAGED, **changes))


def test_speculative_passes_are_refused(stock, make_world):
    world = make_world(MIXED, ForwardMode.TARGET_VERIFY)
    backend = cuda_attention.create(world.runner)
    with pytest.raises(ConfigError, match="TARGET_VERIFY"):
        backend.init_forward_metadata(world.batch)


@pytest.mark.parametrize(
    ("dtype", "kv"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float8_e4m3fn)]
)
def test_other_dtypes_are_refused_when_the_server_starts(stock, dtype, kv):
    runner = runner_for(PAGED, dtype=dtype, kv_cache_dtype=kv)
    with pytest.raises(ConfigError, match="bfloat16, float16 or float32"):
        cuda_attention.create(runner)


@pytest.mark.parametrize("number", [1, 2], ids=["translated", "windows"])
def test_models_of_another_kind_are_refused_when_the_server_starts(stock, number, monkeypatch):
    init = FlashInferAttnBackend.__init__

    def otherwise(backend, *args, **kwargs):
        init(backend, *args, **kwargs)
        backend.num_wrappers = number
        backend.kv_index_translator.reads_are_translated = number == 1

    monkeypatch.setattr(FlashInferAttnBackend, "__init__", otherwise)
    with pytest.raises(ConfigError, match="no sliding windows"):
        cuda_attention.create(runner_for(PAGED, device="cpu"))


@models
def test_each_model_has_the_backend_of_its_kind_over_sglangs(stock, model):
    backend = cuda_attention.create(runner_for(model, device="cpu"))
    assert type(backend) is model.backend and isinstance(backend, model.stock)
    # A plan needs the lengths on the CPU, which SGLang's Triton backend does without.
    assert backend.needs_cpu_seq_lens


def test_kernels_are_chosen_for_the_heads_of_one_rank(stock, ranks):
    runner = runner_for(replace(LATENT, heads=(48, 1)))
    assert type(cuda_attention.create(runner)) is cuda_attention.ExactBackend
    ranks[0] = 3
    assert type(cuda_attention.create(runner)) is cuda_attention.LatentBackend


def test_the_name_gives_sglangs_own_backend_unless_contexts_are_streamed(stock, monkeypatch):
    from sglang.srt.layers.attention import attention_registry

    monkeypatch.setitem(attention_registry.ATTENTION_BACKENDS, "flashinfer", lambda runner: "own")
    assert attention_backend.create(runner_for(PAGED)) == "own"
    backend = attention_backend.create(runner_for(PAGED, {"stream_context": True}))
    assert type(backend) is cuda_attention.PagedBackend


@pytest.mark.parametrize("cuda", [True, False])
def test_prefixes_of_latents_are_expanded_in_chunks_as_under_flashinfers_name(cuda, monkeypatch):
    from sglang.srt.arg_groups import choices

    chunked = [*choices.CHUNKED_PREFIX_CACHE_SUPPORTED_ATTENTION_BACKENDS]
    chunked = [name for name in chunked if name != "smg"]
    monkeypatch.setattr(choices, "CHUNKED_PREFIX_CACHE_SUPPORTED_ATTENTION_BACKENDS", chunked)
    monkeypatch.setattr(choices, "add_chunked_prefix_cache_attention_backend", chunked.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    for _ in range(2):
        plugin._register_admission_hooks(lambda *hook: None, HookType)
    assert chunked.count("smg") == cuda
