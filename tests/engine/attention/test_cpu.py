"""The backend through SGLang's interface gives what torch_native gives."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import sglang  # noqa: F401  # the platform class needs it imported first
import torch
from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from smg_sglang.engine.attention import backend as attention_backend
from smg_sglang.engine.attention.cpu import CpuAttentionBackend
from smg_sglang.errors import ConfigError

HEADS, KV_HEADS, DIM, SLOTS = 4, 2, 32, 400


class RecordingPool:
    """What the backends use of SGLang's KV pool, and the calls in their order."""

    def __init__(self, layers=2, dtype=torch.float32, kv_heads=KV_HEADS, dim=DIM):
        torch.manual_seed(0)
        self.dtype = dtype
        self.k = [torch.randn(SLOTS, kv_heads, dim).to(dtype) for _ in range(layers)]
        self.v = [torch.randn(SLOTS, kv_heads, dim).to(dtype) for _ in range(layers)]
        self.calls = []

    def get_key_buffer(self, layer):
        self.calls.append(("key", layer))
        return self.k[layer]

    def get_value_buffer(self, layer):
        self.calls.append(("value", layer))
        return self.v[layer]

    def set_kv_buffer(self, layer, place, k, v):
        self.calls.append(("set", layer.layer_id))
        self.k[layer.layer_id][place.loc] = k.to(self.dtype)
        self.v[layer.layer_id][place.loc] = v.to(self.dtype)


class World:
    """Requests (cached, new) with scattered slots, and one layer's inputs."""

    def __init__(self, requests, mode=ForwardMode.EXTEND, dtype=torch.float32, pool=None):
        lengths = [cached + new for cached, new in requests]
        self.pool = pool or RecordingPool(dtype=dtype)
        torch.manual_seed(1)
        table = torch.zeros(len(requests) + 2, 128, dtype=torch.int32)
        rows = torch.arange(len(requests)) + 2
        slots = torch.randperm(SLOTS)[: sum(lengths)].int().split(lengths)
        for row, mine in zip(rows, slots, strict=True):
            table[row, : len(mine)] = mine
        new = [mine[cached:] for mine, (cached, _) in zip(slots, requests, strict=True)]
        self.runner = SimpleNamespace(
            device="cpu",
            req_to_token_pool=SimpleNamespace(req_to_token=table),
            token_to_kv_pool=self.pool,
        )
        self.batch = SimpleNamespace(
            forward_mode=mode,
            req_pool_indices=rows,
            seq_lens=torch.tensor(lengths),
            extend_prefix_lens=torch.tensor([cached for cached, _ in requests]),
            extend_seq_lens=torch.tensor([count for _, count in requests]),
            out_cache_loc=torch.cat(new).long(),
            encoder_lens=None,
        )
        tokens = sum(count for _, count in requests)
        self.q = torch.randn(tokens, HEADS * DIM).to(dtype)
        self.k, self.v = (torch.randn(tokens, KV_HEADS, DIM).to(dtype) for _ in range(2))

    def run(self, backend_class, layer, **kwargs):
        backend = backend_class(self.runner)
        backend.init_forward_metadata(self.batch)
        return backend.forward(self.q, self.k, self.v, layer, self.batch, **kwargs)


def make_layer(**how):
    return RadixAttention(HEADS, DIM, DIM**-0.5, KV_HEADS, how.pop("layer_id", 0), **how)


def assert_same_as_stock(world, layer, tolerance=1e-5):
    got = world.run(CpuAttentionBackend, layer)
    want = world.run(TorchNativeAttnBackend, layer)
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


BATCHES = {
    "cold": [(0, 40), (0, 1), (0, 7)],
    "cached prefix": [(60, 5), (33, 17)],
    "mixed": [(60, 1), (0, 20), (33, 4), (80, 1)],
}


@pytest.mark.parametrize("requests", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_extend_batch_gives_what_torch_native_gives(requests, dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert_same_as_stock(World(requests, dtype=dtype), make_layer(), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_decode_batch_gives_what_torch_native_gives(dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    world = World([(60, 1), (0, 1), (99, 1)], ForwardMode.DECODE, dtype)
    assert_same_as_stock(world, make_layer(), tolerance)


def test_an_encoder_sees_later_tokens():
    layer = make_layer(attn_type=AttentionType.ENCODER_ONLY)
    assert_same_as_stock(World([(0, 40), (0, 1)]), layer)


@pytest.mark.parametrize("mode", [ForwardMode.EXTEND, ForwardMode.DECODE])
def test_a_sliding_window_is_left_to_torch_native(mode):
    world = World([(60, 1), (30, 1)], mode)
    assert_same_as_stock(world, make_layer(sliding_window_size=8))


def test_layers_that_share_anothers_keys_read_them_from_the_pool():
    world = World([(0, 9), (20, 3)])
    world.k = world.v = None
    assert_same_as_stock(world, make_layer())


def test_a_pool_of_another_dtype_counts_as_it_is_stored():
    world = World([(0, 9), (20, 3)], pool=RecordingPool(dtype=torch.bfloat16))
    assert_same_as_stock(world, make_layer())


def test_prompts_expanded_from_a_latent_pool_are_attended_as_they_come():
    world = World([(0, 9), (0, 1)], pool=RecordingPool(kv_heads=1, dim=48))
    got = world.run(CpuAttentionBackend, make_layer(), save_kv_cache=False)
    stored = World([(0, 9), (0, 1)])
    torch.testing.assert_close(got, stored.run(TorchNativeAttnBackend, make_layer()))


@pytest.mark.parametrize("requests", [[(60, 5)], [(60, 1)], [(0, 5)]])
def test_each_layer_asks_the_pool_once_after_its_own_write(requests):
    world = World(requests)
    backend = CpuAttentionBackend(world.runner)
    backend.init_forward_metadata(world.batch)
    assert world.pool.calls == []
    for layer_id in (0, 1):
        layer = make_layer(layer_id=layer_id)
        backend.forward(world.q, world.k, world.v, layer, world.batch)
        assert world.pool.calls == [("set", layer_id), ("key", layer_id), ("value", layer_id)]
        world.pool.calls.clear()


def test_a_logit_cap_changes_the_result():
    world = World([(60, 5), (30, 1)])
    plain = world.run(CpuAttentionBackend, make_layer())
    capped = world.run(CpuAttentionBackend, make_layer(logit_cap=0.5))
    assert not torch.allclose(plain, capped, atol=1e-3)


def test_attention_sinks_are_refused_by_name():
    with pytest.raises(ConfigError, match="sinks"):
        World([(5, 3)]).run(CpuAttentionBackend, make_layer(), sinks=torch.zeros(HEADS))


def test_a_logit_cap_with_a_window_is_refused():
    with pytest.raises(ConfigError, match="logit cap with a sliding window"):
        World([(5, 3)]).run(CpuAttentionBackend, make_layer(logit_cap=30.0, sliding_window_size=8))


def test_speculative_decoding_is_refused():
    world = World([(5, 3)], ForwardMode.TARGET_VERIFY)
    with pytest.raises(ConfigError, match="speculative"):
        world.run(CpuAttentionBackend, make_layer())


def test_registering_twice_registers_once():
    attention_backend.register()
    attention_backend.register()
    assert ATTENTION_BACKEND_CHOICES.count(attention_backend.NAME) == 1
    assert ATTENTION_BACKENDS[attention_backend.NAME] is attention_backend.create


def test_another_device_is_refused_with_what_to_do():
    with pytest.raises(ConfigError, match="leave the flag out"):
        attention_backend.create(SimpleNamespace(device="xpu"))
