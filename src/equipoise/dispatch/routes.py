"""What every dispatcher does at home: sum the outputs of a token's slots.

Axis letters: T tokens of this rank, K slots per token, M rows, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_BYTES = 1 << 20
"""Outputs that a processor weighs and sums at a time: they stay in its cache."""


def sum_by_weight(output_MD: Tensor, row_M: Tensor, weight_TK: Tensor) -> Tensor:
    """Sum the outputs of each token's slots by weight.

    The multiplication and the sum over k are those of Hugging Face's experts, in the same shape,
    so that equal outputs give equal sums.

    Args:
        output_MD: [M, D], outputs in the order of row_M.
        row_M: [M] int64, t * K + k of each row; a pair that is absent counts as 0.
        weight_TK: [T, K], any float dtype; the sum is made in the wider of both dtypes.
    Returns:
        [T, D] in the dtype of output_MD.
    Collective: none; no host sync.
    """
    (num_tokens, top_k), width = weight_TK.shape, output_MD.shape[1]
    num_pairs, num_rows = num_tokens * top_k, len(row_M)
    # Absent pairs read a row of zeros behind the others.
    source_P = row_M.new_full((num_pairs,), num_rows)
    source_P[row_M] = torch.arange(num_rows, device=row_M.device)
    if num_rows < num_pairs:
        output_MD = torch.cat((output_MD, output_MD.new_zeros(1, width)))
    chunk = max(1, num_tokens)
    if output_MD.device.type == "cpu":
        chunk = max(1, _CHUNK_BYTES // max(1, top_k * width * output_MD.element_size()))
    sum_TD = output_MD.new_empty(num_tokens, width)
    for first in range(0, num_tokens, chunk):
        weight_C1 = weight_TK[first : first + chunk].reshape(-1, 1)
        source_C = source_P[first * top_k :][: len(weight_C1)]
        weighted = output_MD.index_select(0, source_C) * weight_C1
        sum_TD[first : first + chunk] = weighted.view(-1, top_k, width).sum(dim=1)
    return sum_TD
