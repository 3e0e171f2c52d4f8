"""What every test may use: models that come without a hub, and a fixed order of the suite."""

import os
import sys
from pathlib import Path

import pytest

# Before any test imports transformers, which reads these once. Nothing here may ask a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS.parent))  # `tools` and `bench` are not installed


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """SmolLM2-135M-Instruct in bf16, as `make model` prepares it."""
    from tools.demo_model import demo_model

    return demo_model()


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """A random 4-layer Llama with GQA in fp32 and the demo tokenizer; the same on every run."""
    from tools.models.dense import Recipe
    from tools.models.recipe import random_model

    return random_model(Recipe(dtype="float32"))


@pytest.fixture(scope="session")
def tiny_model_bf16() -> Path:
    """`tiny_model` with its weights rounded to bf16."""
    from tools.models.dense import Recipe
    from tools.models.recipe import random_model

    return random_model(Recipe(dtype="bfloat16"))


@pytest.fixture(scope="session")
def tiny_mla_bf16() -> Path:
    """A random 4-layer DeepSeek-V2 in bf16, without experts; its heads and latents are as wide as
    DeepSeek's."""
    from tools.models.mla import Recipe
    from tools.models.recipe import random_model

    return random_model(Recipe(dtype="bfloat16"))


@pytest.fixture(scope="session")
def tiny_mla() -> Path:
    """A random 4-layer DeepSeek-V2 in fp32 with small latents."""
    from tools.models.mla import Recipe
    from tools.models.recipe import random_model

    return random_model(Recipe(dtype="float32", latent=128, nope=64, value=64))


@pytest.fixture
def cuda(monkeypatch):
    """A CUDA device that is not there: streams and events with an order, kernels in Triton's
    interpreter."""
    from tests.fake_cuda import FakeCuda
    from tests.interpreter import interpreted

    with interpreted(monkeypatch, "smg_sglang.transfer.triton_rows"):
        yield FakeCuda().install(monkeypatch)


def pytest_configure(config: pytest.Config) -> None:
    # SWIG modules of sentencepiece and the like; one comes after pytest's own last line.
    config.addinivalue_line("filterwarnings", "ignore:builtin type:DeprecationWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks by folder, and runs what is fast first: unit tests, then tests/e2e, then tests/gpu."""
    for item in items:
        if (kind := _kind(item)) is not None:
            item.add_marker(kind)
    items.sort(key=lambda item: (None, "e2e", "gpu").index(_kind(item)))


def _kind(item: pytest.Item) -> str | None:
    folder = item.path.relative_to(TESTS).parts[0]
    return folder if folder in ("e2e", "gpu") else None
