"""SGLang's own file backend, in a directory of the test."""

import os

import numpy as np
import pytest

from smg_sglang.engine.storage.backend import open_backend
from smg_sglang.errors import ConfigError
from smg_sglang.storage.sealed import SEAL_BYTES, seal, unseal

SIZE = 4096 + SEAL_BYTES
NAMES = [f"{n:032x}-ns" for n in range(8)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.delenv("SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR", raising=False)
    return tmp_path


def opened(folder, **settings):
    return open_backend("file", {"file_storage_path": str(folder), **settings})


def rows(n=8):
    made = np.random.default_rng(0).integers(0, 256, (n, SIZE), dtype=np.uint8)
    for name, row in zip(NAMES, made, strict=False):
        seal(name, row[:-SEAL_BYTES].copy(), row)
    return made


def test_what_was_put_is_got_by_another_process(folder):
    assert opened(folder).put(NAMES, rows()) == [True] * 8
    other, into = opened(folder), np.zeros((8, SIZE), np.uint8)
    assert other.exists([*NAMES, "none"]) == 8
    assert other.get(NAMES, into) == [True] * 8
    np.testing.assert_array_equal(into, rows())
    assert all(unseal(n, row) is not None for n, row in zip(NAMES, into, strict=True))


def test_rows_in_reverse_are_those_of_their_names(folder):
    backend, into = opened(folder), np.zeros((8, SIZE), np.uint8)
    backend.put(NAMES[::-1], rows()[::-1])
    backend.get(NAMES[::-1], into[::-1])
    np.testing.assert_array_equal(into, rows())


def test_what_is_missing_or_cut_short_is_told_apart(folder):
    backend, into = opened(folder), np.zeros((8, SIZE), np.uint8)
    backend.put(NAMES, rows())
    files = {name: next(folder.glob(f"{name}*")) for name in NAMES}
    files[NAMES[2]].unlink()
    os.truncate(files[NAMES[5]], 100)
    assert backend.exists(NAMES) == 2
    assert backend.get(NAMES, into) == [n not in (2, 5) for n in range(8)]
    backend.discard(NAMES[5])
    backend.discard(NAMES[5])
    assert not files[NAMES[5]].exists()


def test_a_limit_in_bytes_is_kept_and_the_oldest_go(folder):
    backend = opened(folder, max_size=5 * SIZE, eviction_ratio=1.0)
    for name, row in zip(NAMES, rows(), strict=True):
        assert backend.put([name], row[None]) == [True]
    assert sum(file.stat().st_size for file in folder.glob("*.bin")) <= 5 * SIZE
    assert [backend.exists([name]) for name in NAMES] == [0, 0, 0, 1, 1, 1, 1, 1]


def test_a_disk_without_room_refuses_pages(folder):
    backend = opened(folder, min_free_space=1 << 60)
    assert backend.put(NAMES, rows()) == [False] * 8


def test_a_directory_that_went_away_refuses_pages(folder):
    backend = opened(folder / "gone")
    (folder / "gone").rmdir()
    assert backend.put(NAMES[:1], rows(1)) == [False]
    assert backend.exists(NAMES) == 0


def dynamic(name):
    module = "tests.engine.storage.own_backend"
    return open_backend(
        "dynamic", {"backend_name": "own", "module_path": module, "class_name": name}
    )


def test_a_backend_of_somebodys_own_is_driven():
    backend, into = dynamic("OwnBackend"), np.zeros((8, SIZE), np.uint8)
    assert backend.put(NAMES, rows()) == [True] * 8
    assert backend.exists([*NAMES, "none"]) == 8
    assert backend.get([*NAMES[:7], "none"], into) == [True] * 7 + [False]
    np.testing.assert_array_equal(into[:7], rows()[:7])
    backend.discard(NAMES[0])  # it has no word for it


@pytest.mark.parametrize(
    ("name", "why"), [("OldBackend", "OldBackend has no batch_get_v2"), ("None_", "not found")]
)
def test_a_class_that_is_none_or_too_old_is_one_sentence(name, why):
    with pytest.raises(ConfigError, match=why):
        dynamic(name)


def test_a_backend_that_cannot_be_opened_is_one_sentence(folder):
    with pytest.raises(ConfigError, match="'file' cannot be opened") as told:
        opened("/proc/1/nothing")
    assert "\n" not in str(told.value)
