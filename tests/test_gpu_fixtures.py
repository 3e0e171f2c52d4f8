"""The GPU tests are skipped where there is no GPU: at least what they ask for must be there."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COLLECT = """
import sys
import pytest

class Missing:
    def pytest_collection_finish(self, session):
        self.items = len(session.items)
        self.found = {
            f"{item.nodeid} asks for {name}"
            for item in session.items
            for name in item.fixturenames
            if name not in item._fixtureinfo.name2fixturedefs and name != "request"
            and name not in getattr(getattr(item, "callspec", None), "params", {})
        }

missing = Missing()
pytest.main(["--collect-only", "-qq", "tests/gpu"], plugins=[missing])
sys.exit("\\n".join(missing.found) if missing.found or not missing.items else 0)
"""


def test_every_gpu_test_finds_its_fixtures():
    done = subprocess.run(
        [sys.executable, "-c", COLLECT], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
