"""What a bundle holds, what it leaves out and what its target has: plain tables."""

from __future__ import annotations

#: MiB that the archive may have.
LIMIT_MIB = 58
PYTHON, PLATFORMS = "3.12", (
    "manylinux_2_34_x86_64",
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_24_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
)  # fmt: skip
SGLANG, KERNELS = "sglang==0.5.23", "sglang-kernel==0.4.10"
#: The newest whose compiled parts load with PyTorch 2.11.
OLD_KERNELS = "sglang-kernel==0.4.5"
FLASHINFER = "flashinfer-python==0.7.2"

#: What SGLang imports and the target has not. `gguf` and `soundfile` are imported at start, too.
PACKAGES = (
    "annotated-types==0.8.0",
    "apache-tvm-ffi==0.1.11",
    "cffi==2.1.1",
    "compressed-tensors==0.18.0",
    "dill==0.4.1",
    "distro==1.9.0",
    "fastapi==0.165.0",
    "gguf==0.19.0",
    "interegular==0.3.3",
    "jiter==0.19.0",
    "jsonschema==4.26.0",
    "jsonschema-specifications==2025.9.1",
    "loguru==0.7.3",
    "msgspec==0.22.0",
    "openai==2.8.0",
    "opentelemetry-api==1.45.2",
    "orjson==3.13.0",
    "partial-json-parser==0.2.1.1.post7",
    "pybase64==1.5.1",
    "pycparser==3.12",
    "pydantic==2.14.4",
    "pydantic-core==2.50.5",
    "pydantic-extra-types==2.11.1",
    "python-multipart==0.0.34",
    "pyzmq==27.3.0",
    "referencing==0.37.0",
    "rpds-py==2026.9.1",
    "setproctitle==1.3.8",
    "sniffio==1.3.1",
    "soundfile==0.13.1",
    "starlette==1.10.0",
    "typing-inspection==0.4.5",
    "uvicorn==0.54.0",
    "xgrammar==0.2.7",
)

#: Paths below the bundle's Python folder, as patterns of `fnmatch`, that nothing here reaches.
LEFT_OUT = (
    "sglang/multimodal_gen/*",
    "sglang/test/*",
    "sglang/srt/rust_extensions/_*",
    "sglang/kernels/jit/benchmark/*",
    "flashinfer/data/cccl/*",
    "flashinfer/data/cutlass/*",
    "flashinfer/data/spdlog/*",
    "flashinfer/data/csrc/cake_*",
    "flashinfer/data/csrc/kda*",
    "flashinfer/data/csrc/fused_moe/*",
    "flashinfer/data/csrc/alphamoe*",
    "flashinfer/data/csrc/blackwell_*",
    "flashinfer/data/csrc/experimental/*",
    "flashinfer/data/csrc/gdn/*",
    "sgl_kernel/*.so",
    "sgl_kernel/sm*/*",
    "*/__pycache__/*",
    "*.pyi",
    "*/tests/*",
)
#: Patterns that LEFT_OUT does not touch.
KEPT = ("sgl_kernel/testing/*",)
#: Of OLD_KERNELS, below the bundle's Python folder.
OLD_LIBRARIES = ("sgl_kernel/sm90/common_ops.abi3.so", "sgl_kernel/spatial_ops.abi3.so")

#: What a bundle's SGLang must never import: CuTe's DSL alone unpacks to half a gigabyte.
FORBIDDEN = ("cutlass", "quack", "deep_gemm", "tilelang")

#: Of the project itself.
PROJECT = ("smg_sglang", "tests", "bench", "tools", "pyproject.toml", "README.md", "LICENSE")

#: On the target already, beside Python, torch 2.11 and nvcc 13.0; a distribution's normalised name.
ON_TARGET = frozenset(
    {
        "accelerate",
        "aiohttp",
        "annotated-doc",
        "anyio",
        "attrs",
        "certifi",
        "charset-normalizer",
        "click",
        "cloudpickle",
        "einops",
        "filelock",
        "fsspec",
        "grpcio",
        "h11",
        "h5py",
        "httpcore",
        "httpx",
        "huggingface-hub",
        "hypothesis",
        "idna",
        "iniconfig",
        "jinja2",
        "llvmlite",
        "markdown-it-py",
        "markupsafe",
        "matplotlib",
        "mdurl",
        "msgpack",
        "networkx",
        "ninja",
        "numba",
        "numpy",
        "nvidia-ml-py",
        "packaging",
        "pandas",
        "pillow",
        "pluggy",
        "portalocker",
        "prometheus-client",
        "protobuf",
        "psutil",
        "pyarrow",
        "pygments",
        "pytest",
        "pytest-benchmark",
        "pytest-timeout",
        "python-dateutil",
        "pyyaml",
        "regex",
        "requests",
        "rich",
        "safetensors",
        "scipy",
        "sentencepiece",
        "setuptools",
        "six",
        "sympy",
        "tabulate",
        "tiktoken",
        "timm",
        "tokenizers",
        "torch",
        "torchaudio",
        "torchvision",
        "tqdm",
        "transformers",
        "triton",
        "typer",
        "typing-extensions",
        "urllib3",
        "uvloop",
        "xxhash",
        "zipp",
    }
)
