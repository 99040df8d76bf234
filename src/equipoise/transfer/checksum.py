"""Checksums of experts, the same on every device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_COLUMNS = 1 << 16
_MULTIPLIER = 6364136223846793005  # Knuth's, of his MMIX generator: odd, so no power of it is 0


def sum_experts(tensors: Iterable[Tensor]) -> Tensor:
    """One checksum for each expert over all of its tensors.

    A polynomial in the bytes modulo 2^64: it notices changed, moved and exchanged bytes.

    Args:
        tensors: for each tensor of the layer [n, row bytes] uint8; at least one.
    Returns:
        [n] int64 on the CPU.
    Collective: none.
    """
    total: Tensor | None = None
    for rows in tensors:
        if total is None:
            total = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
        for columns in rows.split_with_sizes(_widths(rows.shape[1]), dim=1):
            powers = _powers(columns.shape[1], rows.device)
            # One more than the byte, so that zeros count too.
            terms = (columns.to(torch.int64) + 1) * powers
            total = total * _MULTIPLIER + terms.sum(1)
    assert total is not None, "a layer has at least one tensor"
    return total.cpu()


def _widths(num_bytes: int) -> list[int]:
    full, rest = divmod(num_bytes, _COLUMNS)
    return [_COLUMNS] * full + ([rest] if rest else [])


def _powers(count: int, device: torch.device) -> Tensor:
    return torch.full((count,), _MULTIPLIER, dtype=torch.int64, device=device).cumprod(0)
