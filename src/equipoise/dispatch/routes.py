"""What every dispatcher does at home: sum the outputs of a token's slots.

Axis letters: T tokens of this rank, K slots per token, M rows, D hidden.
"""

from __future__ import annotations

from torch import Tensor


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
    Collective: none.
    """
    num_tokens, num_slots = weight_TK.shape
    output_TKD = output_MD.new_zeros(num_tokens * num_slots, output_MD.shape[1])
    output_TKD[row_M] = output_MD
    weighted = output_TKD * weight_TK.reshape(-1, 1)
    return weighted.view(num_tokens, num_slots, output_MD.shape[1]).sum(dim=1).to(output_MD.dtype)
