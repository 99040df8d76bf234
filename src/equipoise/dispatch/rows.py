"""What kernels of fixed shapes need around them, whoever's they are: rounding, and dequantising.

Axis letters: D hidden; "..." any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from equipoise.errors import ConfigError

FP8_BLOCK = 128
"""Elements of a row that share a scale."""


def maybe_roundup_layer_hidden_size(hidden_size: int, sizes: Sequence[int]) -> int:
    """The hidden size that rows are padded to.

    Args:
        hidden_size: D of the layer.
        sizes: those that the kernels have, ascending.
    Returns:
        The least of them that holds D.
    Collective: none.
    Raises: ConfigError if D is above the largest.
    """
    for size in sizes:
        if hidden_size <= size:
            return size
    raise ConfigError(
        f"a hidden size of {hidden_size} is above {sizes[-1]}, the largest that the kernels have: "
        "use the torch dispatcher"
    )


def dequant_fp8(quantized: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Rows as they were before FP8 dispatch, to its precision.

    Args:
        quantized: [..., D] float8_e4m3fn.
        scales: [..., D / 128] float32; or [..., D / 512] int32 of four UE8M0 exponents each, the
            first in the lowest byte.
        dtype: of the result.
    Returns:
        [..., D], each element times its block's scale; the product is made in float32.
    Collective: none; no host sync.
    Raises: ConfigError if there are not as many scales as blocks.
    """
    hidden_size = quantized.shape[-1]
    if scales.dtype == torch.int32:
        exponents = scales.contiguous().view(torch.uint8).int()
        # A float32 whose exponent field it is; 0 stands for 2 ** -127, which needs a mantissa.
        scales = torch.where(exponents == 0, 1 << 22, exponents << 23).view(torch.float32)
    if scales.shape != (*quantized.shape[:-1], hidden_size // FP8_BLOCK):
        raise ConfigError(
            f"{tuple(scales.shape)} scales do not fit rows of {tuple(quantized.shape)}: there must "
            f"be one for each {FP8_BLOCK} elements"
        )
    blocks = quantized.float().view(*scales.shape, FP8_BLOCK)
    return (blocks * scales[..., None]).view(quantized.shape).to(dtype)
