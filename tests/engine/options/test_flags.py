import argparse
from types import SimpleNamespace

import pytest

from smg_sglang.config import OPTIONS, SmgConfig, flags
from smg_sglang.engine.options import command_line, configuration, refusals
from smg_sglang.engine.options.record import is_enabled
from smg_sglang.errors import ConfigError


def make_args(**changes):
    """An SGLang record of arguments as far as `configure` looks at it."""
    fields = {
        "page_size": None,
        "device": "cpu",
        "mem_fraction_static": None,
        "max_total_tokens": None,
        "enable_hierarchical_cache": False,
        "hicache_storage_backend": None,
        "enable_lmcache": False,
        "enable_flexkv": False,
        "enable_unified_cache_external_linker": False,
        "radix_cache_backend": None,
        "disable_radix_cache": False,
        "pp_size": 1,
        "attn_cp_size": 1,
        "dcp_size": 1,
        "tp_size": 1,
        "disaggregation_mode": "null",
        "speculative_algorithm": None,
        "enable_memory_saver": False,
        "enable_pdmux": False,
        # where contexts are streamed
        "attention_backend": None,
        "prefill_attention_backend": None,
        "decode_attention_backend": None,
        "chunked_prefill_size": None,
        "allow_auto_truncate": False,
        "dllm_algorithm": None,
        "dtype": "auto",
        "kv_cache_dtype": "auto",
        "enable_dp_attention": False,
        "enable_two_batch_overlap": False,
    }
    return SimpleNamespace(**(fields | changes))


def parse(*argv):
    parser = argparse.ArgumentParser()
    command_line.add_cli_args(parser)
    return parser.parse_args(argv)


def test_nothing_is_touched_without_the_flag():
    record = make_args()
    before = dict(vars(record))
    command_line.configure_from_cli(record, parse())
    assert vars(record) == before


def test_the_flag_selects_our_linker_and_a_page_size():
    record = make_args()
    command_line.configure_from_cli(record, parse("--enable-smg", "--smg-host-gb", "0.5"))
    assert record.page_size == SmgConfig.page_size
    assert record.enable_unified_cache_external_linker
    config = record.unified_cache_external_linker_config
    assert config["linker_extra_config"]["host_gb"] == 0.5
    assert is_enabled(record)


def test_on_a_cpu_the_pool_leaves_room_for_the_host_tier():
    default, chosen = make_args(), make_args(max_total_tokens=4096)
    for record in (default, chosen):
        configuration.configure(record, {"host_gb": 0.5}, origin="cli")
    assert default.mem_fraction_static == configuration.CPU_MEM_FRACTION
    assert chosen.mem_fraction_static is None


def test_sglangs_own_page_size_wins():
    record = make_args(page_size=64)
    configuration.configure(record, {"host_gb": 0.5}, origin="cli")
    assert record.page_size == 64


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"enable_hierarchical_cache": True}, "--enable-hierarchical-cache"),
        ({"enable_lmcache": True}, "--enable-lmcache"),
        ({"disable_radix_cache": True}, "--disable-radix-cache"),
        ({"pp_size": 2}, "--pp-size"),
        ({"dcp_size": 2}, "--dcp-size"),
        ({"kv_cache_dtype": "nvfp4"}, "--kv-cache-dtype nvfp4"),
        ({"disaggregation_mode": "prefill"}, "--disaggregation-mode"),
        ({"speculative_algorithm": "EAGLE"}, "--speculative-algorithm"),
        ({"enable_memory_saver": True}, "--enable-memory-saver"),
        ({"enable_pdmux": True}, "--enable-pdmux"),
    ],
)
def test_what_cannot_be_combined_is_refused_by_name(changes, flag):
    with pytest.raises(ConfigError, match=flag):
        configuration.configure(make_args(**changes), {"host_gb": 0.5}, origin="engine")


def test_kv_in_fp8_is_not_rounded_to_fp8():
    given = {"host_gb": 0.5, "host_dtype": "fp8"}
    configuration.configure(make_args(kv_cache_dtype="bf16"), given, origin="engine")
    with pytest.raises(ConfigError, match="--kv-cache-dtype fp8_e5m2, which is stored as it is"):
        configuration.configure(make_args(kv_cache_dtype="fp8_e5m2"), given, origin="engine")


def test_a_wrong_flag_ends_with_one_sentence_and_code_2(capsys):
    with pytest.raises(SystemExit) as end:
        command_line.configure_from_cli(make_args(), parse("--enable-smg", "--smg-host-gb", "-3"))
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("smg: --smg-host-gb") and err.count("\n") == 1


@pytest.mark.parametrize("flag", ["--smg-host-gb", "--smg-page-size"])
def test_a_zero_is_not_the_default(flag, capsys):
    with pytest.raises(SystemExit):
        command_line.configure_from_cli(make_args(), parse("--enable-smg", flag, "0"))
    assert flag in capsys.readouterr().err


def test_a_flag_of_ours_without_the_switch_is_refused(capsys):
    with pytest.raises(SystemExit):
        command_line.configure_from_cli(make_args(), parse("--smg-host-gb", "3"))
    assert "--smg-host-gb needs --enable-smg" in capsys.readouterr().err


def test_an_untested_sglang_is_refused_unless_it_is_asked_for(monkeypatch):
    import sglang

    monkeypatch.setattr(sglang, "__version__", "9.9.9")
    with pytest.raises(ConfigError, match=r"9\.9\.9 was not tested"):
        configuration.configure(make_args(), {"host_gb": 0.5}, origin="cli")
    configuration.configure(
        make_args(), {"host_gb": 0.5, "allow_untested_sglang": True}, origin="cli"
    )


def test_engine_keywords_are_split():
    theirs, ours = command_line.split_kwargs(
        {"model_path": "m", "enable_smg": True, "smg_host_gb": 2}
    )
    assert theirs == {"model_path": "m"}
    assert ours == {"host_gb": 2}
    assert command_line.split_kwargs({"model_path": "m"}) == ({"model_path": "m"}, None)


@pytest.mark.parametrize("kwargs", [{"smg_host_gb": 2}, {"enable_smg": True, "smg_colour": 1}])
def test_engine_keywords_that_make_no_sense_are_refused(kwargs):
    with pytest.raises(ConfigError):
        command_line.split_kwargs(kwargs)


STREAMS = {"host_gb": 0.5, "stream_context": True}


def test_streams_on_cuda_choose_our_backend_and_say_that_it_never_ran_there(caplog):
    record = make_args(device="cuda")
    configuration.configure(record, STREAMS, origin="cli")
    assert record.attention_backend == "smg"
    assert "has never run on" in caplog.text


def test_without_streams_sglang_chooses_its_backend_on_cuda(caplog):
    record = make_args(device="cuda")
    configuration.configure(record, {"host_gb": 0.5}, origin="cli")
    assert record.attention_backend is None
    assert "never run" not in caplog.text


def test_streams_on_a_cpu_leave_the_choice_to_the_platform(caplog):
    record = make_args()
    configuration.configure(record, STREAMS, origin="cli")
    assert record.attention_backend is None
    assert "never run" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"attention_backend": "fa3"}, "--attention-backend fa3"),
        ({"prefill_attention_backend": "fa3"}, "--prefill-attention-backend"),
        ({"decode_attention_backend": "triton"}, "--decode-attention-backend"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "--kv-cache-dtype fp8_e4m3"),
        ({"enable_dp_attention": True}, "--enable-dp-attention"),
        ({"enable_two_batch_overlap": True}, "--enable-two-batch-overlap"),
    ],
)
def test_what_streams_on_cuda_cannot_be_combined_with_is_refused_by_name(changes, flag):
    with pytest.raises(ConfigError, match=flag):
        configuration.configure(make_args(device="cuda", **changes), STREAMS, origin="engine")


def test_streams_on_another_device_are_refused():
    with pytest.raises(ConfigError, match="not on npu"):
        configuration.configure(make_args(device="npu"), STREAMS, origin="engine")


@pytest.fixture
def latent_model(monkeypatch):
    from sglang.srt.arg_groups import model_override_base
    from sglang.srt.configs.model_config import AttentionArch
    from sglang.srt.mem_cache import kv_cache_builder

    model = SimpleNamespace(
        hf_config=SimpleNamespace(architectures=["LlamaForCausalLM"]),
        is_hybrid_swa=False,
        attention_arch=AttentionArch.MLA,
        num_attention_heads=128,
        hf_text_config=SimpleNamespace(),
    )
    monkeypatch.setattr(model_override_base, "model_config_of", lambda _: model)
    monkeypatch.setattr(kv_cache_builder, "uses_ssm_state", lambda _: False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_latent_attention_is_streamed_in_every_dtype(latent_model, device, dtype):
    record = make_args(device=device, dtype=dtype, chunked_prefill_size=8192, is_embedding=False)
    configuration.configure(record, STREAMS, origin="engine")
    refusals.refuse_model(record)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_chunks_that_flashinfer_has_no_plan_for_are_refused_at_start(latent_model, device):
    record = make_args(device=device, chunked_prefill_size=8193, is_embedding=False)
    configuration.configure(record, STREAMS, origin="engine")
    if device == "cpu":
        refusals.refuse_model(record)
        return
    with pytest.raises(ConfigError, match="at most 8192 tokens"):
        refusals.refuse_model(record)
    record.tp_size = 2
    refusals.refuse_model(record)


@pytest.mark.parametrize(("given", "chosen"), [(None, configuration.CPU_STREAM_CHUNK), (512, 512)])
def test_streams_on_a_cpu_choose_a_chunk_where_the_user_gave_none(given, chosen):
    record = make_args(chunked_prefill_size=given)
    configuration.configure(record, STREAMS, origin="cli")
    assert record.chunked_prefill_size == chosen


def test_each_flag_can_be_given_on_every_way_that_is_derived_from_it(monkeypatch):
    values = {
        "write_policy": "selective",
        "eviction_policy": "lfu",
        "host_gb": "0.5",
        "host_dtype": "fp8",
        "storage": "file",
    }
    monkeypatch.setenv("SMG_ENABLE", "1")
    for field, option in OPTIONS.items():
        text = values.get(field, "1")
        parsed = parse(option.flag, *([] if option.type is bool else [text]))
        monkeypatch.setenv(option.variable, text)
        ways = [
            flags.from_namespace(parsed)[field],
            flags.from_keywords({f"smg_{option.name}": option.read(text)})[field],
            flags.from_environment()[field],
        ]
        assert ways == [option.read(text)] * 3
