"""A request whose prefix is on its way from storage waits, on all ranks, and then looks again."""

from types import SimpleNamespace

import pytest

from smg_sglang.engine.cache.linker_wrapper import SmgLinkerWrapper
from smg_sglang.engine.cache.radix_cache import SmgRadixCache

PATH = bytes(160)


class Below:
    """Host memory and storage: one brings to the other what `arrive` says."""

    def __init__(self):
        self.host_pages, self.comes, self.done, self.taken = 2, 0, False, False
        self.forgotten = []

    def find(self, rid, path, start):
        return self.host_pages

    def forget(self, rid):
        self.forgotten.append(rid)

    def waits(self, rid, path, have):
        return not self.done

    def has_come(self, rid):
        come, self.taken = self.done and not self.taken, True
        return come

    def arrive(self, pages):
        self.done, self.host_pages = True, pages

    def span(self, rid):
        return 32, (self.host_pages - 2) * 16


@pytest.fixture
def below():
    return Below()


def make_wrapper(below, others=lambda facts: facts, stored=True):
    wrapper = SmgLinkerWrapper.__new__(SmgLinkerWrapper)
    wrapper.waiting = set()
    wrapper.tier = SimpleNamespace(lookups=below, stored=below if stored else None)
    wrapper.cache = SimpleNamespace(least_of_ranks=lambda *facts: others(list(facts)))
    return wrapper


def make_cache(wrapper):
    cache = SmgRadixCache.__new__(SmgRadixCache)
    cache.linker = wrapper
    return cache


def test_it_waits_and_then_finds_what_has_come(below):
    wrapper = make_wrapper(below)
    assert wrapper._find("r", PATH, 0) == 2 and wrapper.waiting == {"r"}
    below.arrive(10)
    wrapper.waiting.clear()
    assert wrapper._find("r", PATH, 0) == 10 and not wrapper.waiting
    assert below.forgotten == ["r"], "the former answer"
    assert wrapper._find("r", PATH, 0) == 10 and below.forgotten == ["r"]


def test_all_ranks_wait_for_the_slowest_and_take_the_shortest(below):
    below.arrive(10)
    wrapper = make_wrapper(below, others=lambda facts: [min(facts[0], 4), 0])
    assert wrapper._find("r", PATH, 0) == 4 and wrapper.waiting == {"r"}


def test_without_storage_nobody_waits(below):
    wrapper = make_wrapper(below, stored=False)
    assert wrapper._find("r", PATH, 0) == 2 and not wrapper.waiting
    assert not make_cache(wrapper).waits_for_storage(SimpleNamespace(rid="r"))


def test_sglang_is_told_what_storage_brought_once_the_request_may_go(below):
    wrapper = make_wrapper(below)
    cache, req = make_cache(wrapper), SimpleNamespace(rid="r")
    wrapper._find("r", PATH, 0)
    assert cache.waits_for_storage(req)
    wrapper.waiting.clear()
    below.arrive(10)
    assert not cache.waits_for_storage(req)
    assert (req.storage_hit_start, req.storage_hit_length) == (32, 128)


def test_the_adder_passes_it_over_until_it_may_go(below):
    wrapper = make_wrapper(below)
    cache, req, adder = make_cache(wrapper), SimpleNamespace(rid="r"), SimpleNamespace()
    wrapper._find("r", PATH, 0)
    assert cache.wait_for_prefix(adder, req).name == "CONTINUE"
    wrapper.waiting.clear()
    assert cache.wait_for_prefix(adder, req) is None
