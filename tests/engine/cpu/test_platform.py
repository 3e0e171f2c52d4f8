"""The CPU platform: when it steps in, and what it sets."""

from __future__ import annotations

import os
import pkgutil
from types import SimpleNamespace

import pytest

from smg_sglang.engine.cpu import activation as platform
from smg_sglang.engine.cpu import cores as cpu_cores


@pytest.fixture
def plain_cpu(monkeypatch):
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    monkeypatch.delenv("SGLANG_PLATFORM", raising=False)
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    monkeypatch.setattr(platform, "accelerator_available", lambda: False)
    monkeypatch.setattr(platform, "entry_points", lambda group: [])


def plugin(name, answer):
    return SimpleNamespace(name=name, load=lambda: answer)


def test_a_plain_cpu_gets_the_platform(plain_cpu):
    assert platform.activate() == platform.PLATFORM_CLASS


def test_an_accelerator_is_left_to_its_own_platform(plain_cpu, monkeypatch):
    monkeypatch.setattr(platform, "accelerator_available", lambda: True)
    assert platform.activate() is None


def test_sglangs_own_cpu_engine_is_left_alone(plain_cpu, monkeypatch):
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert platform.activate() is None


def test_another_platform_plugin_goes_first(plain_cpu, monkeypatch):
    other = plugin("other", lambda: "other.Platform")
    monkeypatch.setattr(platform, "entry_points", lambda group: [other])
    assert platform.activate() is None


def test_a_plugin_that_sglang_was_told_to_skip_is_not_asked(plain_cpu, monkeypatch):
    other = plugin("other", lambda: "other.Platform")
    monkeypatch.setattr(platform, "entry_points", lambda group: [other])
    monkeypatch.setenv("SGLANG_PLUGINS", "smg, smg_cpu")
    assert platform.activate() == platform.PLATFORM_CLASS


def test_a_broken_plugin_does_not_take_the_platform_away(plain_cpu, monkeypatch):
    def broken():
        raise ImportError("no driver")

    monkeypatch.setattr(platform, "entry_points", lambda group: [plugin("other", broken)])
    assert platform.activate() == platform.PLATFORM_CLASS


def test_two_plugins_that_ask_each_other_come_to_an_end(plain_cpu, monkeypatch):
    asked = []

    def polite():
        asked.append("polite")
        return None if platform.activate() else "other.Platform"

    monkeypatch.setattr(platform, "entry_points", lambda group: [plugin("other", polite)])
    assert platform.activate() == platform.PLATFORM_CLASS
    assert asked == ["polite"]


@pytest.fixture
def cpu():
    import sglang  # noqa: F401  # it imports the platform class, so it has to come first

    return pkgutil.resolve_name(platform.PLATFORM_CLASS)()


@pytest.fixture
def environment(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "SGLANG_CPU_OMP_THREADS_BIND"):
        # set, then deleted, so that what the platform sets is undone too
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("SMG_CPU_THREADS_BIND", "")
    monkeypatch.delenv("SMG_CPU_THREADS_BIND")
    monkeypatch.setattr(cpu_cores, "usable_cores", lambda: [0, 1, 2, 3])
    return monkeypatch


def arguments(**given):
    defaults = {"tp_size": 1, "pp_size": 1, "dp_size": 1, "base_gpu_id": 0, "gpu_id_step": 1}
    defaults |= {"cuda_graph_config": None, "attention_backend": "intel_amx"}
    return SimpleNamespace(**defaults | {"_raw_input": given} | given)


def test_the_device_is_named_by_a_string(cpu):
    assert cpu.get_device() == "cpu"
    assert cpu.is_out_of_tree()


def test_the_scheduler_sleeps_when_idle_and_threads_wait_passively(cpu, environment):
    args = arguments()
    cpu.apply_server_args_defaults(args)
    assert args.sleep_on_idle is True
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_a_wait_policy_of_the_user_stays(cpu, environment):
    environment.setenv("OMP_WAIT_POLICY", "ACTIVE")
    cpu.apply_server_args_defaults(arguments())
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_an_attention_backend_of_the_user_stays(cpu, environment):
    args = arguments(attention_backend="torch_native")
    cpu.apply_server_args_defaults(args)
    assert args.attention_backend == "torch_native"


def test_the_backend_without_a_wish_is_not_one_that_needs_sgl_kernel(cpu, environment):
    args = arguments()
    cpu.apply_server_args_defaults(args)
    assert args.attention_backend == cpu.get_default_attention_backend() != "intel_amx"


def test_one_rank_is_not_bound(cpu, environment):
    cpu.apply_server_args_defaults(arguments())
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in os.environ


def test_each_rank_gets_its_cores(cpu, environment):
    cpu.apply_server_args_defaults(arguments(tp_size=2))
    assert os.environ["SGLANG_CPU_OMP_THREADS_BIND"] == "0,1|2,3"


def test_an_own_binding_is_chosen_again_for_the_next_engine(cpu, environment):
    cpu.apply_server_args_defaults(arguments(tp_size=2))
    cpu.apply_server_args_defaults(arguments(dp_size=4))
    assert os.environ["SGLANG_CPU_OMP_THREADS_BIND"] == "0|1|2|3"
    cpu.apply_server_args_defaults(arguments())
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in os.environ


def test_a_binding_of_the_user_stays(cpu, environment):
    environment.setenv("SGLANG_CPU_OMP_THREADS_BIND", "3|1")
    cpu.apply_server_args_defaults(arguments(tp_size=2))
    assert os.environ["SGLANG_CPU_OMP_THREADS_BIND"] == "3|1"


def test_gpu_ids_that_start_later_or_step_wider_find_their_cores(cpu, environment):
    cpu.apply_server_args_defaults(arguments(tp_size=2, base_gpu_id=1, gpu_id_step=2))
    groups = os.environ["SGLANG_CPU_OMP_THREADS_BIND"].split("|")
    assert (groups[1], groups[3]) == ("0,1", "2,3")


def test_more_ranks_than_cores_share_them():
    assert cpu_cores.share_cores([4, 7], 3) == [[4], [7], [4]]


def test_every_rank_has_the_same_number_of_cores():
    assert cpu_cores.share_cores([0, 1, 2, 3, 4], 2) == [[0, 1], [2, 3]]


def test_a_binding_is_read_as_it_is_written():
    groups = [[0, 1, 2], [5]]
    assert cpu_cores.parse_binding(cpu_cores.format_binding(groups)) == groups
    assert cpu_cores.parse_binding("0-2|5") == groups
    assert cpu_cores.parse_binding("all") == []


@pytest.mark.parametrize(("text", "quota"), [("150000 100000", 1.5), ("max 100000", None)])
def test_the_quota_of_cgroup_v2_is_read(tmp_path, text, quota):
    (tmp_path / "cpu.max").write_text(text)
    assert cpu_cores.cpu_quota(tmp_path) == quota


@pytest.mark.parametrize(("text", "quota"), [("200000", 2.0), ("-1", None)])
def test_the_quota_of_cgroup_v1_is_read(tmp_path, text, quota):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(text)
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert cpu_cores.cpu_quota(tmp_path) == quota


def test_a_quota_below_one_core_still_leaves_one(tmp_path):
    (tmp_path / "cpu.max").write_text("50000 100000")
    assert len(cpu_cores.usable_cores(tmp_path)) == 1
