import shutil
import tempfile

import pytest

from tests.memory.conftest import RunningServer
from tests.storage.world import World


@pytest.fixture
def world():
    directory = tempfile.mkdtemp(prefix="smg-t-")
    made = World(RunningServer(directory))
    yield made
    made.close()
    shutil.rmtree(directory, ignore_errors=True)
