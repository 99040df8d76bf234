"""Checkpoints with quantised weights: which can be taken over, and what computes with them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import nn

from equipoise.errors import ModelError
from equipoise.models.quiet import first_line

METHODS = ("fp8", "mxfp4")
"""Quantisations, as config.json names them, whose experts are known: weights in blocks, and a scale
for each. `mxfp4` is dequantised as it is read; `fp8` is computed with where there are kernels."""


def choose_quantisation(config: Any, *, dequantize: bool) -> None:
    """Refuse quantisations that are not known, and ask for weights that need no kernels.

    Args:
        config: transformers' configuration of a model; changed in place.
        dequantize: whether weights are to be dequantised as they are read.
    Collective: none.
    Raises: ModelError that names the quantisation.
    """
    said = getattr(config, "quantization_config", None)
    if said is None:
        if dequantize:
            raise ModelError("dequantize: config.json names no quantisation")
        return
    if not isinstance(said, dict):
        said = said.to_dict()
    method = str(said.get("quant_method"))
    if method not in METHODS:
        raise ModelError(
            f"its weights are quantised by {method}, and what of it belongs to an expert is not "
            f"known: {' and '.join(METHODS)} can be taken over"
        )
    if method == "fp8" and not said.get("weight_block_size"):
        raise ModelError(
            "its weights are fp8 without weight_block_size, one scale for a whole tensor: only "
            "scales of blocks are known"
        )
    # Kernels of MXFP4 keep their weights in a layout of their own.
    said["dequantize"] = dequantize or method == "mxfp4" or bool(said.get("dequantize"))
    config.quantization_config = said


def keeps_quantised(quantizer: Any) -> bool:
    """Whether weights stay quantised in memory."""
    if quantizer is None:
        return False
    return not getattr(quantizer.quantization_config, "dequantize", False)


def check_kernels(model: nn.Module) -> None:
    """Refuse a model that nothing here can compute with, before its weights are read.

    Args:
        model: whose weights stay quantised.
    Collective: none.
    Raises: ModelError that says what is lacking and what to do.
    """
    integration: Any = import_module("transformers.integrations.finegrained_fp8")
    try:
        integration.load_finegrained_fp8_kernel()
    except Exception as error:  # whatever loading of kernels from a hub raises
        raise ModelError(
            f"{type(model).__name__} has FP8 weights, and transformers' kernels for them cannot be "
            f"loaded ({first_line(error)}): pip install kernels and let it reach its hub, or ask "
            "for dequantize=True"
        ) from error
