import numpy as np
import torch

from smg_sglang.transfer.pinning import ArenaPins
from tests.fake_cuda import FakeCuda


def test_an_arena_is_locked_for_a_device_that_is_named_without_its_number(monkeypatch):
    cuda = FakeCuda().install(monkeypatch)
    arena = np.zeros(1 << 16, np.uint8)
    pins = ArenaPins()
    pins.pin(arena, torch.device("cuda"))
    assert pins.wait(arena)
    assert cuda.driver.registered == {arena.ctypes.data: arena.nbytes}
    pins.close()
    assert cuda.driver.registered == {}
