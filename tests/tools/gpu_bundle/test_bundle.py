"""What goes into a bundle: files, changes of them, and whether their needs are met."""

from __future__ import annotations

import tarfile
import zipfile

import pytest

from tools.gpu_bundle import archive, closure, lay, patches
from tools.gpu_bundle.patches import Patch


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "some.whl"
    with zipfile.ZipFile(path, "w") as made:
        for name in (
            "sglang/srt/server.py",
            "sglang/multimodal_gen/big.py",
            "sgl_kernel/sm100/common_ops.abi3.so",
            "sgl_kernel/__init__.py",
            "flashinfer/data/csrc/batch_decode.cu",
            "flashinfer/data/csrc/cake_fmha.cu",
        ):
            made.writestr(name, "12345")
    return path


def test_what_nothing_reaches_is_left_out_and_counted(wheel, tmp_path):
    site = tmp_path / "site"
    left = lay.unpack([wheel], site)
    kept = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    assert kept == {
        "sglang/srt/server.py",
        "sgl_kernel/__init__.py",
        "flashinfer/data/csrc/batch_decode.cu",
    }
    assert sum(left.values()) == 15


def test_a_file_that_is_not_as_its_patch_expects_ends_the_build(tmp_path, monkeypatch):
    monkeypatch.setattr(patches, "PATCHES", (Patch("a.py", "old", "new", "for a reason"),))
    (tmp_path / "a.py").write_text("old and old")
    with pytest.raises(SystemExit, match="2 times"):
        patches.apply(tmp_path)
    assert (tmp_path / "a.py").read_text() == "old and old"
    (tmp_path / "a.py").write_text("old")
    patches.apply(tmp_path)
    assert (tmp_path / "a.py").read_text() == "new"


@pytest.mark.parametrize("patch", patches.PATCHES, ids=lambda patch: patch.file)
def test_every_patch_applies_to_the_installed_sglang(patch):
    from importlib.metadata import distribution

    text = distribution("sglang").locate_file(patch.file).read_text()
    assert text.count(patch.old) == 1
    compile(text.replace(patch.old, patch.new), patch.file, "exec")


def add(site, name, version, *requires):
    folder = site / f"{name}-{version}.dist-info"
    folder.mkdir(parents=True)
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
    lines += [f"Requires-Dist: {text}" for text in requires]
    (folder / "METADATA").write_text("\n".join(lines) + "\n")


def test_what_is_neither_bundled_nor_on_the_target_is_told(tmp_path):
    add(tmp_path, "web_server", "2.0", "Numpy>=1", "routes>=3", 'winterm; sys_platform == "win32"')
    add(tmp_path, "routes", "2.9", 'colours; extra == "pretty"')
    (told,) = closure.missing(tmp_path)
    assert "web-server requires routes>=3" in told  # an older one is bundled


def test_a_bundle_whose_needs_are_met_has_no_complaints(tmp_path):
    add(tmp_path, "web_server", "2.0", "routes>=3")
    add(tmp_path, "routes", "3.1")
    assert closure.missing(tmp_path) == []


def test_the_same_files_make_the_same_archive(tmp_path):
    folder = tmp_path / "bundle"
    (folder / "site").mkdir(parents=True)
    (folder / "site" / "a.py").write_text("a = 1\n")
    sizes = [archive.write(folder, tmp_path / name) for name in ("one.tar.xz", "two.tar.xz")]
    assert (tmp_path / "one.tar.xz").read_bytes() == (tmp_path / "two.tar.xz").read_bytes()
    assert sizes[0] == (tmp_path / "one.tar.xz").stat().st_size
    with tarfile.open(tmp_path / "one.tar.xz") as tar:
        assert tar.getnames() == ["smg-bundle/site/a.py"]


def test_an_archive_over_the_limit_is_told():
    assert archive.size_trouble(58 << 20) is None
    assert "58.5 MiB" in archive.size_trouble((58 << 20) + (1 << 19))


def test_the_tokenizer_comes_without_the_weights(tmp_path):
    demo = tmp_path / "smollm2-r1"
    demo.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (demo / name).write_text("{}")
    lay.add_tokenizer(demo, tmp_path / "cache")
    found = {path.name for path in (tmp_path / "cache" / "smg_sglang" / "smollm2-r1").iterdir()}
    assert found == {"config.json", "tokenizer.json"}
