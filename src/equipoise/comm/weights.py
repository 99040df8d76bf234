"""What expert weights must be like to be moved."""

from __future__ import annotations

import itertools

from torch import Tensor

from equipoise.comm.base import ExpertWeights
from equipoise.errors import PlacementError


def check_expert_weights(expert_weights: ExpertWeights) -> None:
    """Refuse weights that cannot be moved slot by slot, as bytes.

    Args:
        expert_weights: per layer the tensors [S, ...] of this rank's slots.
    Collective: none.
    Raises: PlacementError that names the layer and the tensor: a layer without tensors, another
        number of slots or another device than the first tensor's, not contiguous, or memory
        that another tensor uses too.
    """
    named: list[tuple[str, Tensor]] = []
    for index, layer in enumerate(expert_weights):
        if not layer:
            raise PlacementError(f"empty expert weights: layer {index} has no tensors")
        named.extend((f"layer {index}, tensor {t}", tensor) for t, tensor in enumerate(layer))
    for name, tensor in named:
        _check_tensor(name, tensor, named[0][1])
    _check_aliases(named)


def _check_tensor(name: str, tensor: Tensor, first: Tensor) -> None:
    if tensor.ndim == 0:
        raise PlacementError(f"{name} is a scalar: its first dimension must be the slot")
    if tensor.shape[0] != first.shape[0]:
        raise PlacementError(
            f"{name} has {tensor.shape[0]} slots, but layer 0 has {first.shape[0]}: every tensor's "
            "first dimension must be the slot"
        )
    if not tensor.is_contiguous():
        raise PlacementError(
            f"{name} is not contiguous: shape {list(tensor.shape)}, strides {list(tensor.stride())}"
        )
    if tensor.device != first.device:
        raise PlacementError(
            f"{name} is on {tensor.device}, but layer 0 is on {first.device}: all must be on one"
        )


def _check_aliases(named: list[tuple[str, Tensor]]) -> None:
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size(), name)
        for name, tensor in named
        if tensor.numel()
    )
    for (_, end, name), (start, _, other) in itertools.pairwise(spans):
        if start < end:
            raise PlacementError(f"{name} and {other} use the same memory: each needs its own")
