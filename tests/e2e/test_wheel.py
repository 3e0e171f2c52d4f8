"""A wheel of the project, installed beside SGLang, serves. Nothing is downloaded: it is built with
the setuptools at hand, and SGLang is that of this environment."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.e2e.conftest import SMG, nothing_left_behind, smg_state
from tools.sglang_server import running_server

ROOT = Path(__file__).parents[2]
#: The tree that this test runs in is on no path of the server's.
ELSEWHERE = {"PYTHONSAFEPATH": "1", "PYTHONPATH": ""}
QUIETLY = ("--quiet", "--disable-pip-version-check", "--no-deps")


def said(*command) -> str:
    """What a command prints."""
    environment = os.environ | ELSEWHERE
    end = subprocess.run(
        [str(word) for word in command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert end.returncode == 0, end.stdout + end.stderr
    return end.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """`pip wheel .` on what a clone has; a build in place leaves files behind, and finds old ones."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    leftovers = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "smg_sglang", tree / "smg_sglang", ignore=leftovers)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tree)
    pip = (sys.executable, "-m", "pip")
    said(*pip, "wheel", *QUIETLY, "--no-build-isolation", "--wheel-dir", folder, tree)
    (found,) = folder.glob("smg_sglang-*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel) -> Path:
    """The interpreter of a new environment with the wheel, and SGLang without our editable copy."""
    folder = wheel.parent / "env"
    said(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    said(*pip, "install", *QUIETLY, "--no-index", wheel)
    # A path in a .pth file is added as it is: .pth files there, such as our editable copy's, do
    # nothing.
    theirs = said(sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    ours = said(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    Path(ours, "sglang-is-there.pth").write_text(theirs + "\n")
    return python


def test_the_wheel_has_every_module_and_nothing_else(wheel):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = ROOT / "smg_sglang"
    sources = [path for path in package.rglob("*") if path.suffix in {".py", ".c", ".h"}]
    files = {str(path.relative_to(ROOT)) for path in sources}
    assert packed == files | {"smg_sglang/py.typed"}


def test_an_installed_wheel_serves(python, tiny_model):
    imported = said(python, "-c", "import smg_sglang; print(smg_sglang.__file__)")
    assert imported.startswith(str(python.parents[1])), "the server would import another copy"
    with (
        nothing_left_behind(),
        running_server(tiny_model, SMG, ELSEWHERE, python=python) as server,
    ):
        assert len(server.generate("Once upon a time", 4)["output_ids"]) == 4
        assert smg_state(server)["memory_connected"]
        assert "smg:memory_connected" in server.get("/metrics")
