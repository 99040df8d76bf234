"""The kernel that fetches the outputs of tokens' slots and weighs them, in one pass.

Axis letters: T tokens of this rank, K slots per token, P pairs of both, M rows, D hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 2048


@triton.jit
def _weigh(  # type: ignore[no-untyped-def]
    outputs, source, weights, weighted, width, ELEMENTS: tl.constexpr
):
    pair = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    is_one = element < width
    row = tl.load(source + pair)
    weight = tl.load(weights + pair).to(tl.float32)
    values = tl.load(outputs + row * width + element, mask=is_one).to(tl.float32)
    # One product in float32, rounded once, as PyTorch makes it.
    product = (values * weight).to(weighted.dtype.element_ty)
    tl.store(weighted + pair * width + element, product, mask=is_one)


def weigh_rows(output_MD: Tensor, source_P: Tensor, weight_TK: Tensor) -> Tensor:
    """Launch the kernel on the current stream.

    Args:
        output_MD: [M, D], contiguous, no wider than float32, on a GPU.
        source_P: [P] int64, which of them is whose.
        weight_TK: [T, K], no wider than float32.
    Returns:
        [P, D], each output times its weight, to the bit what PyTorch's index and product are.
    Collective: none; no host sync.
    """
    width, num_pairs = output_MD.shape[1], len(source_P)
    dtype = torch.promote_types(output_MD.dtype, weight_TK.dtype)
    weighted = torch.empty(num_pairs, width, dtype=dtype, device=output_MD.device)
    if num_pairs:
        elements = min(_ELEMENTS, triton.next_power_of_2(width))
        with torch.cuda.device(output_MD.device):
            _weigh[(num_pairs, triton.cdiv(width, elements))](
                output_MD, source_P, weight_TK.contiguous(), weighted, width, ELEMENTS=elements
            )
    return weighted
