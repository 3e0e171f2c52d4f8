from types import SimpleNamespace

import pytest

from smg_sglang.engine.cache.identity import model_identity, weights_digest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 64)
    return tmp_path


def record(path, **changes):
    fields = {
        "model_path": str(path),
        "revision": None,
        "dtype": "float32",
        "quantization": None,
        "kv_cache_dtype": "auto",
        "quantization_param_path": None,
        "json_model_override_args": "{}",
        "context_length": None,
        "load_format": "auto",
        "random_seed": 1,
    }
    return SimpleNamespace(**(fields | changes))


def test_equal_folders_have_equal_digests(folder, tmp_path_factory):
    copy = tmp_path_factory.mktemp("copy")
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert weights_digest(str(folder)) == weights_digest(str(copy))


@pytest.mark.parametrize("change", ["config.json", "model.safetensors"])
def test_other_content_is_another_model(folder, change):
    before = weights_digest(str(folder))
    data = bytearray((folder / change).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / change).write_bytes(bytes(data))
    assert weights_digest(str(folder)) != before


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bfloat16"},
        {"kv_cache_dtype": "fp8_e4m3"},
        {"json_model_override_args": '{"rope_theta": 1}'},
    ],
)
def test_what_changes_results_changes_the_identity(folder, change):
    assert model_identity(record(folder)) != model_identity(record(folder, **change))


def test_the_seed_matters_only_for_dummy_weights(folder):
    assert model_identity(record(folder)) == model_identity(record(folder, random_seed=2))
    dummy = {"load_format": "dummy"}
    assert model_identity(record(folder, **dummy)) != model_identity(
        record(folder, random_seed=2, **dummy)
    )
