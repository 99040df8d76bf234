"""Tensors as bytes: what travels, whatever the dtype."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

_UNITS = (torch.complex128, torch.int64, torch.int32, torch.int16)
"""Of 16 bytes and less: PyTorch has no wider ones."""


def view_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor of any shape and dtype as [bytes] uint8 over the same storage."""
    return tensor.detach().view(-1).view(torch.uint8)


def view_rows(tensor: Tensor) -> Tensor:
    """A contiguous [S, ...] tensor as [S, row bytes] uint8 over the same storage."""
    num_rows = tensor.shape[0]
    return tensor.detach().view(num_rows, tensor.numel() // max(num_rows, 1)).view(torch.uint8)


def view_widest(*rows: Tensor) -> list[Tensor]:
    """[N, D] tensors of one dtype over the same storage, in the widest unit that they all allow.

    For copies by index, which take as long for an element of 2 bytes as for one of 16. They are
    returned as they are where no unit is wider than theirs.
    """
    (dtype,) = {one.dtype for one in rows}
    if all(one.stride(1) == 1 for one in rows):
        places = ((one.shape[1], one.stride(0), one.storage_offset()) for one in rows)
        step = gcd(*(place for three in places for place in three)) * dtype.itemsize
        for unit in _UNITS:
            if unit.itemsize > dtype.itemsize and step % unit.itemsize == 0:
                return [one.detach().view(unit) for one in rows]
    return list(rows)
