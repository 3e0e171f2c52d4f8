"""The offline engine: `smg_sglang.engine.Engine`, and SGLang's own with SMG_ENABLE=1."""

import subprocess
import sys
import textwrap

import pytest

from tests.e2e.conftest import nothing_left_behind

PROGRAM = """
    import random, sys
    {imports}

    def prompt(seed, n):
        rng = random.Random(seed)
        return [rng.randrange(1000, 40000) for _ in range(n)]

    if __name__ == "__main__":
        engine = Engine(model_path=sys.argv[1], dtype="float32", max_total_tokens=2048, {kwargs})
        sampling = {{"max_new_tokens": 4, "temperature": 0}}
        ask = lambda seed: engine.generate(input_ids=prompt(seed, 900), sampling_params=sampling)
        first = ask(0)
        for seed in range(1, 5):
            ask(seed)
        again = ask(0)
        assert again["output_ids"] == first["output_ids"]
        print("host", again["meta_info"]["cached_tokens_details"]["host"])
        engine.shutdown()
"""


@pytest.mark.parametrize(
    ("imports", "kwargs", "env"),
    [
        ("from smg_sglang.engine import Engine", "enable_smg=True, smg_host_gb=0.25", {}),
        ("from sglang import Engine", "", {"SMG_ENABLE": "1", "SMG_HOST_GB": "0.25"}),
    ],
    ids=["smg_sglang.engine.Engine", "environment"],
)
def test_the_engine_remembers_in_host_memory(tiny_model, tmp_path, imports, kwargs, env):
    import os

    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM).format(imports=imports, kwargs=kwargs))
    with nothing_left_behind():
        end = subprocess.run(
            [sys.executable, program, tiny_model],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
            env={**os.environ, **env},
        )
    assert end.returncode == 0, end.stderr[-3000:]
    assert "host 896" in end.stdout
