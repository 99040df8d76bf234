"""Host copies, and the GPU that they are for."""

from __future__ import annotations

import time

import pytest
import torch

from equipoise.models.pinned import LEAST_BYTES, PinnedTensors

pytestmark = pytest.mark.gpu


def test_they_are_pinned_while_they_are_kept_and_come_faster() -> None:
    device = torch.device("cuda")
    plain = [torch.randn(4 * LEAST_BYTES) for _ in range(16)]
    small = torch.randn(8)
    seconds = [_time(plain, device) for _ in range(3)]
    kept = PinnedTensors([*plain, small], device)
    assert kept.is_pinned
    assert all(tensor.is_pinned() for tensor in plain)
    assert not small.is_pinned()
    pinned = [_time(plain, device) for _ in range(3)]
    assert min(pinned) < min(seconds)
    # Kept twice, they are pinned once, and by whoever came first.
    again = PinnedTensors(plain, device)
    del again
    assert plain[0].is_pinned()
    del kept
    assert not any(tensor.is_pinned() for tensor in plain)
    on_device = plain[0].to(device)
    assert torch.equal(on_device.cpu(), plain[0])


def _time(tensors: list[torch.Tensor], device: torch.device) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    for tensor in tensors:
        tensor.to(device)
    torch.cuda.synchronize()
    return time.perf_counter() - started
