import stat
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tools.hf_folder import ensure_folder, write_weights


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "smg_sglang"


def visible(folder):
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock")


def test_a_folder_is_built_once(cache):
    built = []

    def build(folder):
        built.append(folder)
        (folder / "config.json").write_text("{}")

    assert ensure_folder("m", build) == ensure_folder("m", build) == cache / "m"
    assert len(built) == 1
    assert (cache / "m" / "config.json").read_text() == "{}"


def test_a_failed_build_leaves_nothing_and_can_be_repeated(cache):
    def fail(folder):
        (folder / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        ensure_folder("m", fail)
    assert visible(cache) == []
    assert ensure_folder("m", lambda folder: None).is_dir()


def test_what_a_killed_build_left_is_removed(cache):
    (cache / ".m.tmp-killed").mkdir(parents=True)
    ensure_folder("m", lambda folder: None)
    assert visible(cache) == ["m"]


def test_two_at_once_build_once_and_both_get_the_folder(cache):
    first_is_building, go_on = threading.Event(), threading.Event()
    built, results = [], []

    def build(folder):
        built.append(folder)
        first_is_building.set()
        assert go_on.wait(10)

    def ask():
        results.append(ensure_folder("m", build))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    threads[0].start()
    assert first_is_building.wait(10)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert results == [cache / "m"] * 2
    assert len(built) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_rounded_to_the_dtype_asked_for(tmp_path, dtype):
    path = tmp_path / "model.safetensors"
    value = np.random.default_rng(0).standard_normal((3, 4), dtype=np.float32)
    write_weights(path, {"w": value}, str(dtype).removeprefix("torch."))
    assert torch.equal(load_file(path)["w"], torch.from_numpy(value).to(dtype))
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
