import pytest

from smg_sglang.box import GIB, BoxMemory
from smg_sglang.config import (
    DEFAULT_EVICTION,
    DEFAULT_SPLIT_TOKENS,
    OPTIONS,
    EvictionName,
    SmgConfig,
    WritePolicy,
    checks,
    make_config,
)
from smg_sglang.config.flags import from_environment
from smg_sglang.errors import ConfigError


def free(monkeypatch, gib):
    monkeypatch.setattr(checks, "box_memory", lambda: BoxMemory(2 * gib * GIB, gib * GIB))


def test_the_default_host_size_is_a_share_of_what_is_free(monkeypatch):
    free(monkeypatch, 40)
    assert make_config(device="cpu").host_gb == 10
    assert make_config(device="cuda").host_gb == 20


def test_more_than_is_free_is_refused(monkeypatch):
    free(monkeypatch, 2)
    with pytest.raises(ConfigError, match=r"more than the 2\.0 GiB that are free"):
        make_config(host_gb=3)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"host_gb": -1}, "--smg-host-gb must be at least"),
        ({"host_gb": float("nan")}, "--smg-host-gb must be at least"),
        ({"host_gb": 1e9}, "--smg-host-gb .* is more than"),
        ({"write_policy": "never"}, "--smg-write-policy must be one of"),
        ({"eviction_policy": "mru"}, "--smg-eviction-policy must be one of lru, .*, not 'mru'"),
        (
            {"memory_address": "/run/smg", "eviction_policy": "lru"},
            "leave it out with --smg-memory",
        ),
        ({"hint_share": 1.5}, "--smg-hint-share must be at least 0 and at most 1, not 1.5"),
        ({"memory_address": "/run/smg", "hint_share": 0.5}, "leave it out with --smg-memory"),
        ({"page_size": 12}, r"--smg-page-size .* must be a power of two"),
        ({"page_size": 256}, r"--smg-page-size .* must be a power of two"),
        ({"lookup_timeout_ms": 0}, "--smg-lookup-timeout-ms"),
        ({"lookup_timeout_ms": 20_000}, "above 0 and at most 10000 milliseconds, not 20000"),
        ({"lookup_timeout_ms": float("nan")}, "above 0 and at most 10000 milliseconds, not nan"),
        ({"stream_context": True, "prefill_workers": 1}, "--smg-stream-context cannot be combined"),
        ({"storage": "nixl"}, "--smg-storage must be one of file, mooncake, dynamic, not 'nixl'"),
        ({"storage": "mooncake"}, "mooncake needs the address of a mooncake_master"),
        ({"storage": "file"}, "--smg-storage file needs a directory"),
        ({"storage": "file", "storage_config": "{"}, "--smg-storage-config is no JSON"),
        ({"storage": "file", "storage_config": "[]"}, "must be a JSON object"),
        (
            {"storage": "file", "storage_config": '{"file_storage_path": "/proc/1/x"}'},
            "cannot write to /proc/1/x",
        ),
        (
            {"storage": "dynamic", "storage_config": '{"module_path": "m"}'},
            "needs backend_name, class_name in --smg-storage-config",
        ),
        ({"storage_config": "{}"}, "--smg-storage-config needs --smg-storage"),
        ({"storage": "file", "memory_address": "/run/smg"}, "give --storage to"),
        ({"storage_wait_ms": 0}, "--smg-storage-wait-ms must be above 0"),
        ({"stream_context": True, "host_dtype": "fp8"}, "not as --smg-host-dtype fp8"),
        ({"host_dtype": "int4"}, "--smg-host-dtype must be one of auto, fp8, not 'int4'"),
        ({"memory_address": "tcp://1.2.3.4:5"}, "--smg-memory must be"),
        ({"memory_address": "/" + "x" * 119}, "--smg-memory is longer than"),
        ({"memory_address": "relative/dir"}, "--smg-memory must be"),
        ({"memory_address": "/run/smg", "host_gb": 4}, "leave it out with --smg-memory"),
    ],
)
def test_a_wrong_value_is_refused_in_one_sentence(wrong, says):
    with pytest.raises(ConfigError, match=says) as error:
        make_config(**wrong)
    assert "\n" not in str(error.value)


def test_attaching_needs_no_host_size():
    chosen = make_config(memory_address="ipc:///run/smg")
    assert chosen.memory_address == "/run/smg"
    assert chosen.host_gb is None
    assert chosen.eviction_policy is None


def test_the_environment_chooses_for_programs_without_a_command_line(monkeypatch):
    assert from_environment() is None
    monkeypatch.setenv("SMG_ENABLE", "1")
    monkeypatch.setenv("SMG_HOST_GB", "1.5")
    monkeypatch.setenv("SMG_WRITE_POLICY", "write_back")
    monkeypatch.setenv("SMG_EVICTION_POLICY", "slru")
    chosen = make_config(**from_environment())
    assert (chosen.host_gb, chosen.write_policy) == (1.5, WritePolicy.WRITE_BACK)
    assert chosen.eviction_policy is EvictionName.SLRU


def test_each_policy_can_be_chosen_and_there_is_a_default():
    assert make_config().eviction_policy is DEFAULT_EVICTION
    for name in EvictionName:
        assert make_config(eviction_policy=name.value).eviction_policy is name


def test_a_number_in_the_environment_that_is_none_is_named(monkeypatch):
    monkeypatch.setenv("SMG_ENABLE", "1")
    monkeypatch.setenv("SMG_HOST_GB", "lots")
    with pytest.raises(ConfigError, match="SMG_HOST_GB must be a number"):
        from_environment()


def test_an_empty_variable_is_as_good_as_none(monkeypatch):
    monkeypatch.setenv("SMG_ENABLE", "1")
    monkeypatch.setenv("SMG_HOST_GB", "")
    assert from_environment() == {}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [("host_gb", ".5", 0.5), ("host_gb", " 1 ", 1.0), ("page_size", "016", 16)],
)
def test_numbers_are_read_as_on_the_command_line(monkeypatch, name, text, value):
    monkeypatch.setenv("SMG_ENABLE", "1")
    monkeypatch.setenv(f"SMG_{name.upper()}", text)
    assert from_environment() == {name: value}


def test_the_default_in_words_is_the_value():
    assert OPTIONS["page_size"].default == str(SmgConfig.page_size)
    assert OPTIONS["lookup_timeout_ms"].default == f"{SmgConfig.lookup_timeout_ms:g}"
    assert OPTIONS["write_policy"].default == SmgConfig.write_policy


def test_tokens_that_split_a_prompt_depend_on_the_device():
    for device, tokens in DEFAULT_SPLIT_TOKENS.items():
        chosen = make_config(host_gb=0.1, prefill_workers=1, device=device)
        assert chosen.split_tokens == tokens
