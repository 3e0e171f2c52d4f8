"""`make gpu-bundle`: see docs/gpu.md. Needs PyPI, gcc, git, 5 GB of disk, up to an hour."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tools.demo_model import demo_model
from tools.gpu_bundle import archive, closure, lay, parts, patches, toolkit
from tools.gpu_bundle.fetch import fetch
from tools.hf_folder import cache_dir

HERE = Path(__file__).parent


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make gpu-bundle", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("bench/out/smg-bundle.tar.xz"), help="the archive")
    add("--work", type=Path, default=cache_dir() / "gpu-bundle", help="wheels and kernels, kept")
    add("--check-python", type=Path, help="a Python 3.12 with the target's packages, to look at it")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    folder, site = options.work / archive.NAME, options.work / archive.NAME / "site"
    shutil.rmtree(folder, ignore_errors=True)
    site.mkdir(parents=True)
    _say("wheels")
    left = _lay_out(options.work, site)
    _say("kernels, minutes each; what is there is kept")
    _compile(options.work, site)
    lay.add_project(folder / "project")
    lay.add_tokenizer(demo_model(), folder / "cache")
    shutil.copytree(HERE / "machine", folder, dirs_exist_ok=True)
    (folder / "REPORT.txt").write_text(report := archive.describe(folder, left))
    _say(report)
    if troubles := closure.missing(site):
        raise SystemExit("\n".join(troubles))
    _look_inside(options.check_python, folder, options.work / "toolkit" / toolkit.STUBS)
    _say("archive")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    size = archive.write(folder, options.out)
    _say(f"{options.out}: {size / (1 << 20):.1f} MiB")
    if (trouble := archive.size_trouble(size)) is not None:
        raise SystemExit(trouble)
    return 0


def _lay_out(work: Path, site: Path) -> dict[str, int]:
    """The Python folder; bytes left out by pattern."""
    newest = [parts.SGLANG, parts.KERNELS, parts.FLASHINFER, *parts.PACKAGES]
    wheels = fetch([*newest, parts.OLD_KERNELS], work / "wheels")
    left = lay.unpack([wheels[name] for name in newest], site)
    lay.add_old_libraries(wheels[parts.OLD_KERNELS], site)
    patches.apply(site)
    return dict(left)


def _compile(work: Path, site: Path) -> None:
    tools = work / "toolkit"
    lay.unpack_whole(fetch(toolkit.WHEELS, work / "wheels").values(), tools)
    environment = toolkit.environment(toolkit.lay_toolkit(tools), work)
    command = [sys.executable, "-m", "tools.gpu_bundle.kernels", str(work / "kernels")]
    subprocess.run(command, check=True, env=environment, cwd=lay.ROOT)
    kernels = work / "kernels"
    shutil.copytree(kernels / "flashinfer", site / "flashinfer" / "data" / "aot")
    shutil.copytree(kernels / "sglang", site.parent / "kernels")


def _look_inside(python: Path | None, folder: Path, stubs: Path) -> None:
    """Runs `probe` with the bundle's Python folder before the target's packages."""
    if python is None:
        _say(
            "not looked inside: that takes --check-python, a Python 3.12 with the target's packages"
        )
        return
    paths = [str(toolkit.CLAIMS), str(folder / "site"), str(folder / "project")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment["SMG_BUNDLE_KERNELS"] = str(folder / "kernels")
    environment["LD_LIBRARY_PATH"] = str(stubs)  # there is no driver here
    subprocess.run([str(python), str(HERE / "probe.py")], check=True, env=environment, cwd=folder)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
