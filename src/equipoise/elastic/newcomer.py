"""The model of a rank that comes with nothing: its shape from a checkpoint, the rest from peers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from equipoise.elastic.membership import MembershipPlan, SetShape
from equipoise.elastic.shared_weights import SharedTensor, give_shared
from equipoise.errors import ModelError
from equipoise.models.checkpoint import Checkpoint
from equipoise.models.contract import ExpertLayer
from equipoise.models.experts import ExpertParallelModel, SetPlan, find_expert_sets, take_over


def build_newcomer(
    checkpoint: Checkpoint, sets: Sequence[SetPlan], plan: MembershipPlan, number: int
) -> ExpertParallelModel:
    """Make a newcomer's model, with slots of zeros and the rest on the meta device.

    Args:
        checkpoint: open; only its configuration and headers were read.
        sets: how the next generation spreads its layers.
        plan: of the change.
        number: of the newcomer.
    Collective: none.
    Raises: ModelError if the checkpoint is not of the model that is served.
    """
    for one, shape in zip(sets, plan.serving.shapes, strict=True):
        _compare(checkpoint, one.layers, shape)
    return take_over(checkpoint.model, sets, number, None)


def find_sets(checkpoint: Checkpoint, plan: MembershipPlan) -> list[list[ExpertLayer]]:
    """The checkpoint's sets of layers, as many as are served.

    Collective: none.
    Raises: ModelError if it has others.
    """
    sets = find_expert_sets(checkpoint.model)
    if len(sets) != len(plan.serving.shapes):
        raise ModelError(
            f"{checkpoint.directory} has {len(sets)} sets of MoE layers, and the model that is "
            f"served {len(plan.serving.shapes)}"
        )
    return sets


def finish_newcomer(
    checkpoint: Checkpoint,
    spread: ExpertParallelModel,
    shared: Sequence[SharedTensor],
    device: torch.device,
) -> list[SharedTensor]:
    """Make room for what every rank has; the model is whole once that is filled.

    Args:
        checkpoint: of the model.
        spread: from `build_newcomer`.
        shared: as a serving rank lists it.
        device: where it goes.
    Returns:
        The same, with tensors to be filled.
    Collective: none.
    Raises: as `give_shared`.
    """
    given = give_shared(spread, shared, device)
    checkpoint.finish_without_loading()
    return given


def _compare(checkpoint: Checkpoint, layers: Sequence[ExpertLayer], shape: SetShape) -> None:
    sizes = tuple(
        sum(
            getattr(layer.module, name)[0].numel() * getattr(layer.module, name).element_size()
            for name in layer.tensors
        )
        for layer in layers
    )
    if (layers[0].num_experts, sizes) != (shape.num_experts, shape.expert_bytes):
        raise ModelError(
            f"{checkpoint.directory} has {len(layers)} MoE layers of {layers[0].num_experts} "
            f"experts, {sum(sizes):,} bytes for one of each; ranks serve {shape.num_layers} of "
            f"{shape.num_experts}, {sum(shape.expert_bytes):,} bytes: is it the same model, in the "
            "same dtype?"
        )
