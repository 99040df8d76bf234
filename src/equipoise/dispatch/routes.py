"""What every dispatcher does at home: sum the outputs of a token's slots.

Axis letters: T tokens of this rank, K slots per token, P pairs of both, M rows, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_BYTES = 1 << 20
"""Outputs that a processor weighs and sums at a time: they stay in its cache."""


_KERNEL = (torch.float32, torch.bfloat16, torch.float16)
"""What products are made in, where a kernel makes them."""


def sum_by_weight(output_MD: Tensor, source_P: Tensor, weight_TK: Tensor) -> Tensor:
    """Sum the outputs of each token's slots by weight.

    The multiplication and the sum over k are those of Hugging Face's experts, in the same shape,
    so that equal outputs give equal sums.

    Args:
        output_MD: [M, D], outputs in any order; rows of zeros for slots of -1.
        source_P: [T * K] int64, which of them is whose.
        weight_TK: [T, K], any float dtype; the sum is made in the wider of both dtypes.
    Returns:
        [T, D] in the dtype of output_MD.
    Collective: none; no host sync.
    """
    (num_tokens, top_k), width = weight_TK.shape, output_MD.shape[1]
    if output_MD.device.type != "cpu":
        return _sum_rows(output_MD, source_P, weight_TK)
    chunk = max(1, _CHUNK_BYTES // max(1, top_k * width * output_MD.element_size()))
    sum_TD = output_MD.new_empty(num_tokens, width)
    for first in range(0, num_tokens, chunk):
        weight_CK = weight_TK[first : first + chunk]
        source_C = source_P[first * top_k :][: weight_CK.numel()]
        sum_TD[first : first + chunk] = _sum_rows(output_MD, source_C, weight_CK)
    return sum_TD


def _sum_rows(output_MD: Tensor, source_P: Tensor, weight_TK: Tensor) -> Tensor:
    shape = (*weight_TK.shape, output_MD.shape[1])
    weighted = _weigh(output_MD, source_P, weight_TK)
    return weighted.view(shape).sum(dim=1).to(output_MD.dtype)


def _weigh(output_MD: Tensor, source_P: Tensor, weight_TK: Tensor) -> Tensor:
    if output_MD.is_cuda and torch.promote_types(output_MD.dtype, weight_TK.dtype) in _KERNEL:
        from equipoise.dispatch.weigh_kernel import weigh_rows

        return weigh_rows(output_MD.contiguous(), source_P, weight_TK)
    return output_MD.index_select(0, source_P) * weight_TK.reshape(-1, 1)
