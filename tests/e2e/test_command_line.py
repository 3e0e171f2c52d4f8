"""What is wrong is said in one sentence, before anything starts; what is off changes nothing."""

import json
import shutil
import subprocess
import sys

import pytest

from tests.e2e.conftest import nothing_left_behind
from tools.models import RECIPES
from tools.models.recipe import random_model


def launch(*args):
    return subprocess.run(
        [sys.executable, "-m", "sglang.launch_server", "--model-path", *args],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--enable-smg", "--smg-host-gb", "100000"), "smg: --smg-host-gb 100000 is more than"),
        (("--enable-smg", "--enable-hierarchical-cache"), "smg: --enable-smg cannot be combined"),
    ],
)
def test_a_wrong_flag_ends_at_once(tiny_model, args, says):
    with nothing_left_behind():
        end = launch(str(tiny_model), *args)
    assert end.returncode == 2
    assert says in end.stderr
    assert "Traceback" not in end.stderr


def test_a_model_with_windows_refuses_what_does_not_know_of_them(tiny_model, tmp_path):
    """SGLang lets a model say in its configuration that it is one; only that is read."""
    for file in tiny_model.iterdir():
        shutil.copy(file, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"is_hybrid_swa": True, "sliding_window": 128, "hybrid_layer_pattern": [0, 1, 0, 1]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with nothing_left_behind():
        end = launch(str(tmp_path), "--enable-smg", "--smg-write-policy", "write_back")
    assert end.returncode == 2, end.stderr[-2000:]
    assert "smg: models with sliding-window layers cannot be served with" in end.stderr
    assert "--smg-write-policy write_back" in end.stderr


def test_a_model_with_states_refuses_what_does_not_know_of_them():
    with nothing_left_behind():
        end = launch(str(random_model(RECIPES["hybrid"])), "--enable-smg", "--smg-stream-context")
    assert end.returncode == 2, end.stderr[-2000:]
    assert "smg: models with Mamba or linear-attention layers cannot be served with" in end.stderr
    assert "--smg-stream-context" in end.stderr
