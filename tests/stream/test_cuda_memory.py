"""Where the bank's pages live on an NVIDIA GPU; and that nothing is lost where there is none."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from flash_moe.arrays import address_of
from flash_moe.stream import cuda_memory
from flash_moe.stream.bank import Bank
from tests.devices import CUDA


@pytest.mark.skipif(not CUDA, reason="needs an NVIDIA GPU")
def test_a_bank_stays_in_host_memory() -> None:
    bank = Bank(4, 1 << 21)
    for lane in bank.lanes:
        assert cuda_memory.stays_on_host(lane.address, lane.slots * lane.stride)
        lane.buffer[:] = bytes(len(lane.buffer))
        lane.buffer[12345] = 7
        assert mx.sum(lane.memory.astype(mx.int32)).item() == 7
    other = mx.zeros(1 << 21)
    mx.eval(other)
    assert not cuda_memory.stays_on_host(address_of(other), other.nbytes)


@pytest.mark.skipif(CUDA, reason="this machine has an NVIDIA GPU")
def test_no_driver_is_no_error() -> None:
    memory = np.zeros(1 << 16, np.uint8)
    assert not cuda_memory.stay_on_host(memory.ctypes.data, memory.nbytes)
    assert not cuda_memory.stays_on_host(memory.ctypes.data, memory.nbytes)
