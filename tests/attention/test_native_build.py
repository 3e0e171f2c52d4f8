"""Building the C kernel: what is kept, what is built again, and what stands in without a compiler."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from smg_sglang.attention.native import build
from smg_sglang.attention.native.build import VARIANTS, BuildError, Variant
from smg_sglang.attention.page_attention import find_native, make_page_attention, native

from .page_world import PageWorld

PORTABLE = VARIANTS[-1]
HERE = Path(__file__).parent
CHECK = HERE / "native_check.c"


def counting_compiler(folder: Path) -> Path:
    """A compiler that notes each of its runs in the folder's `runs`."""
    path = folder / "cc"
    path.write_text(f'#!/bin/sh\necho run >> "{folder}/runs"\nexec gcc "$@"\n')
    path.chmod(0o755)
    return path


def runs(folder: Path) -> int:
    return len((folder / "runs").read_text().splitlines())


def test_a_kernel_is_built_once(tmp_path):
    compiler = str(counting_compiler(tmp_path))
    first = build.built(PORTABLE, tmp_path / "cache", compiler)
    assert build.built(PORTABLE, tmp_path / "cache", compiler) == first
    assert runs(tmp_path) == 1
    assert stat.S_IMODE(first.parent.stat().st_mode) == 0o700
    assert [path.name for path in first.parent.iterdir()] == [first.name]


def test_other_sources_or_flags_are_another_kernel(tmp_path, monkeypatch):
    here = [variant for variant in VARIANTS if variant.machine != "aarch64"]
    names = {build._key(variant) for variant in here}
    assert len(names) == len(here)
    for path in build.SOURCES.glob("*.[ch]"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    same = build._key(PORTABLE)
    assert same in names
    with (tmp_path / "workers.h").open("a") as file:
        file.write("\n")
    assert build._key(PORTABLE) not in names


def test_builds_at_the_same_time_do_no_harm(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: build.built(PORTABLE, tmp_path), range(4)))
    assert [path.name for path in tmp_path.iterdir()] == [path.name for path in paths]
    kernel = native(PORTABLE, 1, folder=tmp_path)
    PageWorld([[5]], [1]).check(kernel)
    kernel.close()


def test_a_library_that_is_half_written_is_built_again(tmp_path):
    path = build.built(PORTABLE, tmp_path)
    path.write_bytes(path.read_bytes()[:9000])
    kernel = native(PORTABLE, 1, folder=tmp_path)
    PageWorld([[5]], [1]).check(kernel)
    kernel.close()


def test_a_folder_that_others_may_write_to_is_not_used(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o777)
    path = build.built(PORTABLE, folder)
    assert path.parent != folder
    assert not list(folder.iterdir())
    shutil.rmtree(path.parent)


def test_where_no_folder_can_be_made_the_kernel_is_the_process_own(tmp_path):
    (tmp_path / "file").touch()
    path = build.built(PORTABLE, tmp_path / "file" / "cache")
    assert path.exists()
    shutil.rmtree(path.parent)


def test_without_a_compiler_torch_does_it_and_one_line_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with caplog.at_level(logging.WARNING):
        attention = make_page_attention(2, folder=tmp_path / "cache")
    assert attention.name == "torch"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no C compiler was found" in caplog.text
    PageWorld([[5]], [1]).check(attention)


def test_a_compiler_that_fails_is_quoted(tmp_path):
    (tmp_path / "cc").write_text('#!/bin/sh\necho "x.c:1: error: no such flag" >&2\nexit 1\n')
    (tmp_path / "cc").chmod(0o755)
    with pytest.raises(BuildError, match="error: no such flag"):
        build.built(PORTABLE, tmp_path / "cache", str(tmp_path / "cc"))
    assert not list((tmp_path / "cache").iterdir())


def test_a_compiler_too_old_for_the_best_kernel_builds_the_next(tmp_path, monkeypatch):
    """As gcc 9 is for AVX512-BF16."""
    best = build.runnable()[0]
    if best is PORTABLE:
        pytest.skip("this CPU runs the portable kernel only")
    only_best = sorted(set(best.flags) - set(build.runnable()[1].flags))[0]
    (tmp_path / "cc").write_text(
        f'#!/bin/sh\nfor x; do [ "$x" = "{only_best}" ] && exit 1; done\nexec gcc "$@"\n'
    )
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    kernel = find_native(1, folder=tmp_path / "cache")
    assert kernel is not None
    assert kernel.name == build.runnable()[1].name
    kernel.close()


@pytest.mark.parametrize(
    ("machine", "flags", "names"),
    [
        ("x86_64", "avx512f avx512bw avx512dq avx512vl avx512_bf16 avx2 fma f16c",
         ["avx512-bf16", "avx512", "avx2", "portable"]),
        ("x86_64", "avx512f avx2 fma f16c", ["avx2", "portable"]),
        ("x86_64", "sse2", ["portable"]),
        ("aarch64", "fp asimd", ["neon", "portable"]),
        ("riscv64", "", ["portable"]),
    ],
)  # fmt: skip
def test_a_cpu_runs_what_it_has(tmp_path, monkeypatch, machine, flags, names):
    label = "Features" if machine == "aarch64" else "flags"
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{label}\t\t: {flags}\n")
    has = build.cpu_flags(tmp_path / "cpuinfo")
    assert [v.name for v in VARIANTS if v.runs_on(machine, has)] == names
    assert build.cpu_flags(tmp_path / "nothing") == frozenset()


@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if v.machine != "aarch64"], ids=lambda v: v.name
)
def test_every_kernel_of_this_machine_can_be_compiled(tmp_path, variant):
    if variant.machine not in {"", platform.machine()}:
        pytest.skip(f"{variant.name} is for {variant.machine}")
    assert build.built(variant, tmp_path).exists()


def checked(compiler: str, variant: Variant, output: Path, *extra: str) -> Path:
    """The C check, which includes the kernel."""
    words = build.command(compiler, variant, output, ["-g", "-O1", f"-I{build.SOURCES}", *extra])
    words = [str(CHECK) if word.endswith(build.MAIN) else word for word in words]
    subprocess.run([w for w in words if w not in {"-shared", "-fPIC", "-O3"}], check=True)
    return output


# One of each width: they take a while to compile.
SANITIZED = {v.width: v for v in reversed(build.runnable())}.values()


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
@pytest.mark.parametrize("variant", SANITIZED, ids=lambda v: v.name)
def test_sanitizers_find_nothing(tmp_path, variant, sanitizers):
    flags = (f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all")
    program = checked(build.find_compiler(), variant, tmp_path / "check", *flags)
    found = subprocess.run([program, "150"], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "150 cases, 0 wrong\n"), found.stderr[-3000:]


def test_neon_is_exact_under_an_emulator(tmp_path):
    compiler, emulator = "aarch64-linux-gnu-gcc", shutil.which("qemu-aarch64-static")
    if not shutil.which(compiler) or not emulator:
        pytest.skip("needs gcc-aarch64-linux-gnu and qemu-user-static")
    neon = next(v for v in VARIANTS if v.name == "neon")
    program = checked(compiler, neon, tmp_path / "check", "-static")
    found = subprocess.run([emulator, program, "150"], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "150 cases, 0 wrong\n"), found.stderr[-3000:]


def test_the_wheel_carries_the_sources():
    text = (HERE.parents[1] / "pyproject.toml").read_text()
    assert "attention/native/*.c" in text
    assert "attention/native/*.h" in text
    assert os.access(build.SOURCES / build.MAIN, os.R_OK)
