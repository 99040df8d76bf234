"""Tensors as bytes: what travels, whatever the dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def view_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor of any shape and dtype as [bytes] uint8 over the same storage."""
    return tensor.detach().view(-1).view(torch.uint8)


def view_rows(tensor: Tensor) -> Tensor:
    """A contiguous [S, ...] tensor as [S, row bytes] uint8 over the same storage."""
    num_rows = tensor.shape[0]
    return tensor.detach().view(num_rows, tensor.numel() // max(num_rows, 1)).view(torch.uint8)
