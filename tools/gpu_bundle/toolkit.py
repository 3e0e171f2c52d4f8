"""nvcc 13.0 from PyPI, laid out as the toolkit that FlashInfer and SGLang look for."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

#: The 13.5 that comes with SGLang refuses the headers of 13.0, which the target has.
WHEELS = (
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-nvvm==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
    "nvidia-curand==10.4.0.*",  # headers, which FlashInfer's sampling includes
)
#: Of a driver, below the folder that the wheels are unpacked in.
STUBS = Path("nvidia/cu13/lib/stubs")
CLAIMS = Path(__file__).parent / "claims"


def lay_toolkit(site: Path) -> Path:
    """`CUDA_HOME` of the wheels unpacked in `site`, with the names that linkers look for."""
    home = site / "nvidia" / "cu13"
    for program in [*(home / "bin").iterdir(), *(home / "nvvm" / "bin").iterdir()]:
        if program.is_file():
            program.chmod(0o755)
    _link(home / "lib64", home / "lib")
    _link(home / "lib" / "libcudart.so", next((home / "lib").glob("libcudart.so.*")))
    _stub_driver(home / "lib" / "stubs")
    return home


def _link(name: Path, target: Path) -> None:
    if not name.exists():
        name.symlink_to(target.name)


#: What libraries of a bundle call of the driver; nothing calls it here.
DRIVER_CALLS = (
    "cuCtxFromGreenCtx",
    "cuCtxPopCurrent_v2",
    "cuCtxPushCurrent_v2",
    "cuDevResourceGenerateDesc",
    "cuDevSmResourceSplitByCount",
    "cuDeviceGetDevResource",
    "cuDriverGetVersion",
    "cuGetErrorString",
    "cuGetProcAddress_v2",
    "cuGreenCtxCreate",
    "cuGreenCtxDestroy",
    "cuGreenCtxGetDevResource",
    "cuPointerGetAttribute",
    "cuStreamCreate",
)


def _stub_driver(folder: Path) -> None:
    """A `libcuda` that does nothing: kernels name it, and the target's driver brings its own."""
    folder.mkdir(exist_ok=True)
    stub, source = folder / "libcuda.so.1", folder / "stub.c"
    source.write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in DRIVER_CALLS))
    command = ["gcc", "-shared", "-fPIC", "-o", str(stub), "-Wl,-soname,libcuda.so.1", str(source)]
    subprocess.run(command, check=True)
    _link(folder / "libcuda.so", stub)


def environment(home: Path, workspace: Path) -> dict[str, str]:
    """For a Python that compiles for an H100 and has none."""
    added = {
        "CUDA_HOME": str(home),
        "CUDA_PATH": str(home),
        "PATH": os.pathsep.join([str(home / "bin"), os.environ["PATH"]]),
        "LIBRARY_PATH": os.pathsep.join([str(home / "lib"), str(home / "lib" / "stubs")]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(CLAIMS), os.environ.get("PYTHONPATH")])),
        "FLASHINFER_CUDA_ARCH_LIST": "9.0a",
        "FLASHINFER_WORKSPACE_BASE": str(workspace),
        "SGLANG_JIT_CACHE_DIR": str(workspace / "sglang"),
        "MAX_JOBS": "2",
    }
    return {**os.environ, **added}
