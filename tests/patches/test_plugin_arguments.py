"""0005: flags, what they set, the environment, and the check of the resolved record."""

from __future__ import annotations

import argparse
import pickle

import pytest

from smg_sglang.config import SmgConfig
from smg_sglang.engine.options.command_line import add_cli_args, configure_from_cli
from smg_sglang.engine.options.record import ATTRIBUTE, is_enabled
from smg_sglang.engine.seams import launch, plugin

SERVER_ARGS = "sglang.srt.server_args"
METHODS = ("add_cli_args", "from_cli_args", "resolve_once", "check_server_args")
ON = ("--model-path", "dummy", "--enable-smg", "--smg-host-gb", "0.25", "--device", "cpu")
OFF = ("--model-path", "dummy", "--device", "cpu")


@pytest.fixture
def checked(monkeypatch):
    from sglang.srt.arg_groups import pipeline, validation_hook

    seen = []
    monkeypatch.setattr(pipeline, "run_resolution_pipeline", lambda record: None)
    monkeypatch.setattr(validation_hook, "check_server_args", lambda record: None)
    monkeypatch.setattr(launch, "start_memory", lambda record: None)
    monkeypatch.setattr(launch, "check_model", seen.append)
    return seen


@pytest.fixture
def hooked(hooks, stock):
    cls = stock.module(SERVER_ARGS).ServerArgs
    hooks.apply("server_args.ServerArgs", cls, *METHODS)
    return cls


@pytest.fixture
def with_patch(patched):
    registry = patched.module("sglang.srt.plugins.arguments")

    class Smg(registry.PluginArguments):
        def add_cli_args(self, parser):
            add_cli_args(parser)

        def from_cli_args(self, server_args, args):
            configure_from_cli(server_args, args)

        def before_resolution(self, server_args):
            plugin._before_resolve_once(server_args)

        def check(self, server_args):
            launch.check_model(server_args)

    registry.register_plugin_arguments(Smg())
    return patched.module(SERVER_ARGS).ServerArgs


def parse(cls, argv):
    parser = argparse.ArgumentParser()
    cls.add_cli_args(parser)
    return cls.from_cli_args(parser.parse_args(argv))


def fields(record):
    """What our part of the record comes to."""
    return {
        "mark": getattr(record, ATTRIBUTE, None),
        "page_size": record.page_size,
        "linker": record.enable_unified_cache_external_linker,
        "config": record.unified_cache_external_linker_config,
    }


@pytest.mark.parametrize("argv", [ON, OFF], ids=["on", "off"])
def test_hook_and_patch_read_the_flags_alike(hooked, with_patch, argv):
    assert fields(parse(hooked, argv)) == fields(parse(with_patch, argv))


def test_without_the_flag_the_record_is_sglangs_own(hooked, with_patch, stock):
    plain = vars(parse(stock.module(SERVER_ARGS).ServerArgs, OFF))
    assert vars(parse(hooked, OFF)) == vars(parse(with_patch, OFF)) == plain


@pytest.mark.parametrize("which", ["hooked", "with_patch"])
def test_a_program_without_a_command_line_chooses_by_environment(
    request, which, checked, monkeypatch
):
    cls = request.getfixturevalue(which)
    off = cls(model_path="dummy", device="cpu")
    off.resolve_once()
    assert not is_enabled(off)
    monkeypatch.setenv("SMG_ENABLE", "1")
    monkeypatch.setenv("SMG_HOST_GB", "0.25")
    record = cls(model_path="dummy", device="cpu")
    record.resolve_once()
    record.resolve_once()
    assert fields(record)["mark"]["origin"] == "environment"
    assert record.page_size == SmgConfig.page_size


@pytest.mark.parametrize("which", ["hooked", "with_patch"])
def test_the_resolved_record_is_checked(request, which, checked):
    record = request.getfixturevalue(which)(model_path="dummy", device="cpu")
    record.check_server_args()
    assert checked == [record]


def test_the_mark_travels_to_the_workers():
    from sglang.srt.server_args import ServerArgs

    record = ServerArgs(model_path="dummy", device="cpu")
    setattr(record, ATTRIBUTE, {"config": {}})
    assert getattr(pickle.loads(pickle.dumps(record)), ATTRIBUTE) == {"config": {}}
