"""Experts of a Hugging Face model become slots of this rank.

Axis letters: T tokens of this rank, K experts per token, N rows that came to this rank, D hidden,
S slots per rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.dispatch.base import TokenDispatcher
from equipoise.dispatch.maps import PlacementMaps
from equipoise.dispatch.replicas import choose_slots
from equipoise.errors import ModelError
from equipoise.load.recorder import LoadRecorder
from equipoise.models.families import FAMILIES

_ExpertsFunction = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


@dataclass
class _Routing:
    """What the layers need to know of the forward pass that runs.

    Attributes:
        valid: [T] bool, False for padding; None if all are tokens.
        first_position: global position of token 0.
        expert_cpu_s: CPU seconds of this thread in the experts' computation, so far.
    """

    valid: Tensor | None = None
    first_position: int = 0
    expert_cpu_s: float = 0.0


@dataclass(frozen=True)
class ExpertParallelModel:
    """A model whose experts are spread over ranks. Owner: the forward thread.

    Attributes:
        model: the Hugging Face model; a call takes part in an exchange per MoE layer.
        expert_weights: per MoE layer the tensors [S, ...] of this rank's slots, contiguous.
        maps: which slot holds which expert; changed in place by whoever balances.
        recorder: counts this rank's tokens by the slot they are sent to.
    """

    model: Any
    expert_weights: list[list[Tensor]]
    maps: PlacementMaps
    recorder: LoadRecorder
    _routing: _Routing = field(default_factory=_Routing, repr=False)

    @property
    def expert_cpu_s(self) -> float:
        """Thread CPU seconds in the experts' computation since the model was made.

        0.0 on a GPU: there the thread only launches kernels, and its time says nothing of theirs.
        """
        return self._routing.expert_cpu_s

    @contextmanager
    def route(self, valid: Tensor | None, first_position: int) -> Iterator[Any]:
        """Tell the layers what the next forward pass is about.

        Args:
            valid: [T] bool on the model's device over the flattened batch, False for padding,
                which is sent nowhere and not counted; None if all are tokens.
            first_position: global position of token 0, which replicas take turns by.
        Returns:
            The model, to be called inside.
        Collective: none; the call of the model is one of every rank.
        """
        routing = self._routing
        routing.valid, routing.first_position = valid, first_position
        try:
            yield self.model
        finally:
            routing.valid, routing.first_position = None, 0


def make_expert_parallel(
    model: nn.Module,
    maps: PlacementMaps,
    rank: int,
    dispatcher: TokenDispatcher,
    recorder: LoadRecorder,
) -> ExpertParallelModel:
    """Take over the experts of a model, in place; the rest of it stays as it is.

    Args:
        model: as transformers loads it, on any device; it is moved to that of `maps`, experts
            slot by slot, so that only this rank's slots need room there.
        maps: the placement to begin with.
        rank: this rank's number in the placement.
        dispatcher: sends tokens to slots.
        recorder: of as many layers and slots as the placement.
    Returns:
        The model with this rank's slots.
    Collective: none; every rank does it before the first call of the model.
    Raises: ModelError if the model has no experts that can be taken over, or other layers or
        experts than the placement.
    """
    _check_shape(model, maps)
    layers = _find_experts(model)
    function = _load_experts_function()
    routing = _Routing()
    expert_weights = []
    for layer, experts in enumerate(layers):
        expert_weights.append(_keep_slots(experts, layer, maps, rank))
        experts.forward = _make_forward(
            experts, layer, maps, dispatcher, recorder, routing, function
        )
    model.to(maps.slot_to_expert.device)
    return ExpertParallelModel(model, expert_weights, maps, recorder, routing)


def count_experts(model: nn.Module) -> tuple[int, int]:
    """L and E: MoE layers of a model, and experts of each.

    Args:
        model: as transformers loads it.
    Collective: none.
    Raises: ModelError if it has no experts that can be taken over, or not as many in all layers.
    """
    counts = [int(module.num_experts) for module in _find_experts(model)]  # type: ignore[arg-type]
    if not counts:
        raise ModelError(
            "the model has no experts that can be taken over: tested families are "
            f"{', '.join(FAMILIES)}"
        )
    if len(set(counts)) > 1:
        raise ModelError(
            f"the model's MoE layers have {' or '.join(map(str, sorted(set(counts))))} experts: "
            "all must have as many"
        )
    return len(counts), counts[0]


def _load_experts_function() -> _ExpertsFunction:
    moe: Any = import_module("transformers.integrations.moe")
    function: _ExpertsFunction = moe.ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    return function


def _find_experts(model: nn.Module) -> list[nn.Module]:
    """Experts modules by layer: those whose computation transformers lets others choose."""
    return [
        module
        for module in model.modules()
        if hasattr(module, "num_experts")
        and hasattr(module, "is_transposed")
        and hasattr(type(module).forward, "__wrapped__")
    ]


def _check_shape(model: nn.Module, maps: PlacementMaps) -> None:
    placement = maps.placement
    num_layers, num_experts = count_experts(model)
    if (num_layers, num_experts) != (placement.num_layers, placement.num_experts):
        raise ModelError(
            f"the model has {num_layers} MoE layers of {num_experts} experts, the placement "
            f"{placement.num_layers} of {placement.num_experts}"
        )


def _keep_slots(experts: nn.Module, layer: int, maps: PlacementMaps, rank: int) -> list[Tensor]:
    """Replace [E, ...] parameters by [S, ...] ones that hold this rank's experts."""
    num_slots = maps.placement.topology.slots_per_rank
    held = torch.tensor(
        maps.placement.slot_to_expert[layer, rank * num_slots : (rank + 1) * num_slots]
    )
    weights = []
    for name, parameter in list(experts.named_parameters(recurse=False)):
        if parameter.ndim == 0 or parameter.shape[0] != experts.num_experts:
            continue
        full = parameter.detach()
        slots = torch.zeros(
            num_slots, *full.shape[1:], dtype=full.dtype, device=maps.slot_to_expert.device
        )
        for slot, expert in enumerate(held.tolist()):
            if expert >= 0:
                slots[slot].copy_(full[expert])
        setattr(experts, name, nn.Parameter(slots, requires_grad=False))
        weights.append(slots)
    experts.num_experts = num_slots  # type: ignore[assignment]
    return weights


def _make_forward(
    experts: nn.Module,
    layer: int,
    maps: PlacementMaps,
    dispatcher: TokenDispatcher,
    recorder: LoadRecorder,
    routing: _Routing,
    function: _ExpertsFunction,
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    on_cpu = maps.slot_to_expert.device.type == "cpu"

    def compute(hidden_ND: Tensor, slot_N: Tensor) -> Tensor:
        if hidden_ND.shape[0] == 0:
            return hidden_ND
        one_N1 = hidden_ND.new_ones(hidden_ND.shape[0], 1)
        return function(experts, hidden_ND, slot_N[:, None], one_N1)

    def forward(hidden_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        slot_TK = choose_slots(maps, layer, expert_TK, routing.first_position, routing.valid)
        recorder.record(layer, slot_TK)
        dispatched = dispatcher.dispatch(hidden_TD, slot_TK)
        started_s = time.thread_time()
        output_ND = compute(dispatched.hidden_ND, dispatched.slot_N)
        if on_cpu:
            routing.expert_cpu_s += time.thread_time() - started_s
        return dispatcher.combine(output_ND, weight_TK, dispatched)

    return forward
