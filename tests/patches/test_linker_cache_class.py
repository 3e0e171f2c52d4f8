"""0001: which cache class is built, and which linker it is given."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

REGISTRY = "sglang.srt.mem_cache.registry"
CONFIG = {"linker_module_path": "linkers_under_test", "linker_extra_config": {}}


class Cache:
    """Takes the place of `UnifiedRadixCache`."""

    def __init__(self, params):
        self.components = {}
        self.linker = None

    def init_cache_linker(self, linker):
        self.linker = linker
        linker.layer_done_counter = None


class SmgCache(Cache):
    """Takes the place of `SmgRadixCache`."""


@pytest.fixture(autouse=True)
def cheap_caches(monkeypatch):
    from sglang.srt.mem_cache import unified_radix_cache

    from smg_sglang.engine.cache import radix_cache as cache

    monkeypatch.setattr(unified_radix_cache, "UnifiedRadixCache", Cache)
    monkeypatch.setattr(cache, "SmgRadixCache", SmgCache)


def install_linkers(source, monkeypatch):
    """Linkers as a plugin module has them; `Ours` names a cache class where SGLang asks for it."""
    base = source.module(
        "sglang.srt.mem_cache.unified_cache.unified_cache_linker"
    ).UnifiedCacheLinker
    methods = {name: lambda self, *a, **k: None for name in base.__abstractmethods__}
    methods["__init__"] = lambda self, *args, **kwargs: None
    linkers = ModuleType("linkers_under_test")
    linkers.Other = type("Other", (base,), methods)
    linkers.Ours = type(
        "Ours", (base,), methods | {"cache_class": classmethod(lambda cls: SmgCache)}
    )
    monkeypatch.setitem(sys.modules, "linkers_under_test", linkers)


def build(source, monkeypatch, wrap, *, linker, marked):
    install_linkers(source, monkeypatch)
    memory = SimpleNamespace(
        enable_unified_cache_external_linker=linker is not None,
        unified_cache_external_linker_backend="dynamic",
        unified_cache_external_linker_config=CONFIG | {"linker": linker},
    )
    for name in ("mem_cache.unified_cache.linker_factory", "mem_cache.registry"):
        module = source.module(f"sglang.srt.{name}")
        monkeypatch.setattr(module, "get_memory", lambda: memory)
    nothing = SimpleNamespace(disaggregation_decode_retraction_backup=None)
    monkeypatch.setattr(module, "get_disagg", lambda: nothing)
    pool = SimpleNamespace(register_layer_transfer_counter=lambda counter: None)
    context = SimpleNamespace(
        server_args=SimpleNamespace(**({"_smg": {}} if marked else {})),
        params=SimpleNamespace(
            req_to_token_pool=None,
            token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool),
        ),
        is_hybrid_swa=False,
        is_hybrid_ssm=False,
        enable_hierarchical_cache=False,
        tp_worker=SimpleNamespace(
            model_runner=SimpleNamespace(forward_stream=None),
            register_hicache_layer_transfer_counter=lambda counter: None,
        ),
    )
    cache = wrap(module.create_unified_radix_cache)(context)
    return type(cache), type(cache.linker).__name__


@pytest.mark.parametrize(
    ("linker", "marked", "expected"),
    [
        (None, False, (Cache, "NoneType")),
        ("Other", False, (Cache, "Other")),
        ("Ours", True, (SmgCache, "Ours")),
    ],
)
def test_hook_and_patch_build_the_same_cache(sglangs, monkeypatch, linker, marked, expected):
    hooks, stock, patched = sglangs

    def hooked(function):
        return hooks.wrap("mem_cache.registry.create_unified_radix_cache", function)

    asked = {"linker": linker, "marked": marked}
    assert build(stock, monkeypatch, hooked, **asked) == expected
    assert build(patched, monkeypatch, lambda function: function, **asked) == expected


def test_a_class_given_by_a_caller_still_wins_in_the_patch(patched):
    text = patched.path(REGISTRY).read_text()
    assert "if cache_class is None and" in text
