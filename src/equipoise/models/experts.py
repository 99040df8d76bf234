"""Experts of a Hugging Face model become slots of this rank.

Axis letters: T tokens of this rank, K experts per token, N rows that came to this rank, D hidden,
S slots per rank.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from equipoise.dispatch.base import (
    Dispatched,
    DispatchedBlocks,
    DispatchedRows,
    TokenDispatcher,
)
from equipoise.dispatch.maps import PlacementMaps
from equipoise.dispatch.replicas import choose_slots
from equipoise.errors import ModelError
from equipoise.load.recorder import LoadRecorder
from equipoise.models.contract import ExpertLayer, find_expert_layers, group_by_size
from equipoise.models.grouped import compute_blocks, compute_rows, computes_grouped


class ExpertReader(Protocol):
    """Where the experts of a rank's slots come from."""

    def read_experts(
        self, layer: ExpertLayer, experts: Sequence[int]
    ) -> Iterator[tuple[range, list[Tensor]]]:
        """Experts of a layer, each once.

        Args:
            layer: whose.
            experts: which, in ascending order.
        Returns:
            Some at a time: which, and their tensors [n, ...] in the order of `layer.tensors`.
        Collective: none.
        """


@dataclass
class _Routing:
    """What the layers need to know of the forward pass that runs.

    Attributes:
        valid: [T] bool, False for padding; None if all are tokens.
        first_position: global position of token 0.
        expert_cpu_s: CPU seconds of this thread in the experts' computation, so far.
    """

    valid: Tensor | None = None
    first_position: int | Tensor = 0
    expert_cpu_s: float = 0.0


@dataclass
class Binding:
    """What the layers of a set work with. Owner: the forward thread.

    One for as long as the model lives: a switch to another generation changes it in one place.

    Attributes:
        maps: which slot holds which expert.
        dispatcher: sends tokens to slots.
        recorder: counts this rank's tokens by slot.
        weights: per layer the tensors that its module holds.
    """

    maps: PlacementMaps
    dispatcher: TokenDispatcher
    recorder: LoadRecorder
    weights: list[list[Tensor]]


@dataclass(frozen=True)
class ExpertSet:
    """MoE layers that have as many experts as each other; most models have one such set.

    Of one generation; those of several share layers and binding, and the weights where they have as
    many slots per rank.

    Attributes:
        layers: as the model has them; layer l is row l of the placement.
        weights: per layer the tensors [S, ...] of this rank's slots, contiguous.
        maps: which slot holds which expert; changed in place by whoever balances.
        dispatcher: sends tokens to slots.
        recorder: counts this rank's tokens by the slot they are sent to.
        binding: what the layers work with at present.
    """

    layers: tuple[ExpertLayer, ...]
    weights: list[list[Tensor]]
    maps: PlacementMaps
    dispatcher: TokenDispatcher
    recorder: LoadRecorder
    binding: Binding

    def bind(self) -> None:
        """Have the layers work with this set from their next call on.

        Collective: none; every rank of a generation at the same step.
        """
        for layer, mine, held in zip(self.layers, self.weights, self.binding.weights, strict=True):
            if mine is not held:
                _hold(layer, mine)
        self.binding.maps = self.maps
        self.binding.dispatcher = self.dispatcher
        self.binding.recorder = self.recorder
        self.binding.weights = self.weights


@dataclass(frozen=True)
class ExpertParallelModel:
    """A model whose experts are spread over ranks. Owner: the forward thread.

    Attributes:
        model: the Hugging Face model; a call takes part in an exchange per MoE layer.
        sets: its MoE layers, by their number of experts.
    """

    model: Any
    sets: tuple[ExpertSet, ...]
    _routing: _Routing = field(default_factory=_Routing, repr=False)

    @property
    def expert_weights(self) -> list[list[Tensor]]:
        """Per MoE layer, set after set, the tensors [S, ...] of this rank's slots, contiguous."""
        return [weights for one in self.sets for weights in one.weights]

    @property
    def maps(self) -> PlacementMaps:
        """Maps of a model whose layers have as many experts.

        Raises: ModelError if they do not; `sets` has the maps of each number of experts then.
        """
        return self._only_set().maps

    @property
    def recorder(self) -> LoadRecorder:
        """Recorder of a model whose layers have as many experts; raises as `maps`."""
        return self._only_set().recorder

    @property
    def expert_cpu_s(self) -> float:
        """Thread CPU seconds in the experts' computation since the model was made.

        0.0 on a GPU: there the thread only launches kernels, and its time says nothing of theirs.
        """
        return self._routing.expert_cpu_s

    def succeed(self, sets: Sequence[ExpertSet]) -> ExpertParallelModel:
        """The same model in another generation; nothing changes until that is bound.

        Args:
            sets: of this model's layers, with its bindings.
        Collective: none.
        """
        return ExpertParallelModel(self.model, tuple(sets), self._routing)

    def bind(self) -> None:
        """Have the model work with these sets from its next call on; as `ExpertSet.bind`."""
        for one in self.sets:
            one.bind()

    @contextmanager
    def route(self, valid: Tensor | None, first_position: int | Tensor) -> Iterator[Any]:
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
        before = routing.valid, routing.first_position
        routing.valid, routing.first_position = valid, first_position
        try:
            yield self.model
        finally:
            routing.valid, routing.first_position = before

    @contextmanager
    def without_experts(self) -> Iterator[Any]:
        """Have experts give back what they are given, for calls that no other rank takes part in.

        Returns:
            The model, to be called inside: to try what the rest of it does.
        Collective: none.
        """
        layers = [layer for one in self.sets for layer in one.layers]
        modules = [module for layer in layers for module in (layer.module, *layer.copies)]
        kept = [module.forward for module in modules]

        def skip(*given: Tensor, **named: Tensor) -> Tensor:
            return given[0] if given else next(iter(named.values()))

        try:
            for module in modules:
                module.forward = skip
            yield self.model
        finally:
            for module, forward in zip(modules, kept, strict=True):
                module.forward = forward

    def _only_set(self) -> ExpertSet:
        if len(self.sets) > 1:
            counts = " or ".join(str(one.maps.placement.num_experts) for one in self.sets)
            raise ModelError(f"layers of this model have {counts} experts: ask for one of its sets")
        return self.sets[0]


@dataclass(frozen=True)
class SetPlan:
    """How one set of layers is spread.

    Attributes:
        layers: which.
        maps: the placement to begin with.
        dispatcher: sends tokens to its slots.
        recorder: of as many layers and slots as the placement.
    """

    layers: Sequence[ExpertLayer]
    maps: PlacementMaps
    dispatcher: TokenDispatcher
    recorder: LoadRecorder


def make_expert_parallel(
    model: nn.Module,
    maps: PlacementMaps,
    rank: int,
    dispatcher: TokenDispatcher,
    recorder: LoadRecorder,
) -> ExpertParallelModel:
    """Take over the experts of a whole model, in place; the rest of it stays as it is.

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
    layers = find_expert_sets(model)
    if len(layers) > 1:
        counts = " or ".join(str(one[0].num_experts) for one in layers)
        raise ModelError(f"the model's MoE layers have {counts} experts, the placement is of one")
    plan = SetPlan(layers[0], maps, dispatcher, recorder)
    spread = take_over(model, [plan], rank, WholeModel())
    model.to(maps.slot_to_expert.device)
    return spread


def take_over(
    model: nn.Module, plans: Sequence[SetPlan], rank: int, reader: ExpertReader | None
) -> ExpertParallelModel:
    """Turn all experts of a model into slots; what else it has stays where it is.

    Args:
        model: on any device, meta included.
        plans: of all its sets of layers.
        rank: this rank's number in the placements.
        reader: gives the experts of the slots; each is asked for once per layer. None leaves zeros
            for the caller to fill.
    Collective: none; every rank does it before the first call of the model.
    Raises: ModelError if a placement is not of a set's layers or experts, or what `reader` raises.
    """
    for plan in plans:
        _check_shape(plan)
    routing = _Routing()
    sets = []
    for plan in plans:
        weights: list[list[Tensor]] = []
        binding = Binding(plan.maps, plan.dispatcher, plan.recorder, weights)
        for row, layer in enumerate(plan.layers):
            weights.append(_keep_slots(layer, row, plan.maps, rank, reader))
            for module in (layer.module, *layer.copies):
                module.forward = _make_forward(module, layer.name, row, binding, routing)
        sets.append(
            ExpertSet(
                tuple(plan.layers), weights, plan.maps, plan.dispatcher, plan.recorder, binding
            )
        )
    return ExpertParallelModel(model, tuple(sets), routing)


def find_expert_sets(model: nn.Module) -> list[list[ExpertLayer]]:
    """Find a model's MoE layers, by their number of experts.

    Collective: none.
    Raises: ModelError if it has none, or some that cannot be taken over.
    """
    layers = find_expert_layers(model)
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no experts that can be taken over: it must be a "
            "Mixture-of-Experts model as transformers makes it"
        )
    return group_by_size(layers)


class WholeModel:
    """Experts out of a model that has all of them."""

    def read_experts(
        self, layer: ExpertLayer, experts: Sequence[int]
    ) -> Iterator[tuple[range, list[Tensor]]]:
        """As the protocol says."""
        tensors = [getattr(layer.module, name).detach() for name in layer.tensors]
        for expert in experts:
            yield range(expert, expert + 1), [tensor[expert : expert + 1] for tensor in tensors]


def _check_shape(plan: SetPlan) -> None:
    placement = plan.maps.placement
    num_layers, num_experts = len(plan.layers), plan.layers[0].num_experts
    if (num_layers, num_experts) != (placement.num_layers, placement.num_experts):
        raise ModelError(
            f"the model has {num_layers} MoE layers of {num_experts} experts, the placement "
            f"{placement.num_layers} of {placement.num_experts}"
        )


def _keep_slots(
    layer: ExpertLayer, row: int, maps: PlacementMaps, rank: int, reader: ExpertReader | None
) -> list[Tensor]:
    """Replace [E, ...] tensors by [S, ...] ones that hold this rank's experts."""
    num_slots = maps.placement.topology.slots_per_rank
    held = maps.placement.slot_to_expert[row, rank * num_slots : (rank + 1) * num_slots].tolist()
    weights = allocate_slots(layer, num_slots, maps.slot_to_expert.device)
    if reader is not None:
        for some, tensors in reader.read_experts(layer, list_held(held)):
            for slot, expert in enumerate(held):
                if expert in some:
                    for slots, tensor in zip(weights, tensors, strict=True):
                        slots[slot].copy_(tensor[expert - some.start])
    # Layer by layer, so that the experts of a whole model go as the slots come.
    _hold(layer, weights)
    return weights


def list_held(held: Iterable[int]) -> list[int]:
    """Which experts some slots hold, each once, in ascending order; -1 is none."""
    return sorted({expert for expert in held if expert >= 0})


def allocate_slots(layer: ExpertLayer, num_slots: int, device: torch.device) -> list[Tensor]:
    """Memory for a layer's slots: its tensors [S, ...], of zeros.

    Args:
        layer: whose tensors say the shape of an expert, and the dtype.
        num_slots: S.
        device: where they go.
    Collective: none.
    """
    return [
        _allocate_slots(getattr(layer.module, name), num_slots, device) for name in layer.tensors
    ]


def _hold(layer: ExpertLayer, weights: list[Tensor]) -> None:
    """Have a layer compute with these tensors [S, ...]."""
    for name, slots in zip(layer.tensors, weights, strict=True):
        is_buffer = name in layer.module._buffers
        held_by_model: Any = slots if is_buffer else nn.Parameter(slots, requires_grad=False)
        # transformers makes values up for what it did not load itself, unless told so.
        held_by_model._is_hf_initialized = True
        for module in (layer.module, *layer.copies):
            setattr(module, name, held_by_model)
    for module in (layer.module, *layer.copies):
        module.num_experts = weights[0].shape[0]  # type: ignore[assignment]


def _allocate_slots(like: Tensor, num_slots: int, device: torch.device) -> Tensor:
    """[S, ...] of zero bytes: not every dtype that weights come in can be filled."""
    slots = torch.empty(num_slots, *like.shape[1:], dtype=like.dtype, device=device)
    slots.view(torch.uint8).zero_()
    return slots


def compute_dispatched(experts: nn.Module, dispatched: Dispatched, top_k: int) -> Tensor:
    """Compute what came to this rank, as the family does it.

    Args:
        experts: the module, whose first dimensions are this rank's slots.
        dispatched: rows, or blocks of them.
        top_k: K of the tokens that were dispatched.
    Returns:
        [N, D], row by row as dispatched; or [S, C, D], where rows came in blocks and the module is
        computed by grouped matmul.
    Collective: none.
    """
    if computes_grouped(experts):
        if isinstance(dispatched, DispatchedBlocks):
            blocks = dispatched.hidden_SCD, dispatched.count_S, dispatched.max_rows
            return compute_blocks(experts, *blocks)
        if isinstance(dispatched, DispatchedRows) and len(dispatched.row_N):
            return compute_rows(experts, dispatched.received_MD, dispatched.row_N, dispatched.slots)
    return _compute_separately(experts, dispatched.hidden_ND, dispatched.slot_N, top_k)


def _compute_separately(
    experts: nn.Module, hidden_ND: Tensor, slot_N: Tensor, top_k: int
) -> Tensor:
    """By the family's own forward, as tokens that go to one expert each."""
    num_rows = hidden_ND.shape[0]
    if num_rows == 0:
        return hidden_ND
    if num_rows == 1 and top_k > 1:
        # A batch of one matrix is multiplied by another kernel, with other last bits than in the
        # plain model, where even one token makes K rows.
        return _compute_separately(experts, hidden_ND.expand(2, -1), slot_N.expand(2), top_k)[:1]
    # The class's own forward: it looks up the implementation that the model is configured for.
    computation: Callable[..., Tensor] = type(experts).forward
    return computation(experts, hidden_ND, slot_N[:, None], hidden_ND.new_ones(num_rows, 1))


def _make_forward(
    experts: nn.Module, name: str, row: int, binding: Binding, routing: _Routing
) -> Callable[..., Tensor]:
    on_cpu = binding.maps.slot_to_expert.device.type == "cpu"
    _, *names = inspect.signature(type(experts).forward).parameters

    def forward(*given: Tensor, **named: Tensor) -> Tensor:
        hidden_TD, expert_TK, weight_TK = *given, *(named[name] for name in names[len(given) :])
        valid_T = routing.valid
        if valid_T is not None and valid_T.shape[0] != hidden_TD.shape[0]:
            raise ModelError(
                f"{name} is given {hidden_TD.shape[0]} tokens, but `valid` speaks "
                f"of {valid_T.shape[0]}: it must say of each token of the batch whether it is one"
            )
        # Looked up at each call: generations change between two of them.
        maps, dispatcher, recorder = binding.maps, binding.dispatcher, binding.recorder
        position = routing.first_position
        if on_cpu:
            slot_TK = choose_slots(maps, row, expert_TK.long(), position, valid_T)
            recorder.record(row, slot_TK)
        else:
            turns, num_turns = maps.turns[row], maps.num_turns[row]
            slot_TK = recorder.choose_and_record(
                row, expert_TK, turns, num_turns, position, valid_T, dispatcher.slot_dtype
            )
        dispatched = dispatcher.dispatch(hidden_TD, slot_TK)
        started_s = time.thread_time()
        output_ND = compute_dispatched(experts, dispatched, expert_TK.shape[1])
        if on_cpu:
            routing.expert_cpu_s += time.thread_time() - started_s
        return dispatcher.combine(output_ND, weight_TK, dispatched)

    # transformers compiles what generates over static caches: an exchange is no part of a graph.
    disable: Callable[..., Callable[..., Tensor]] = torch.compiler.disable
    return disable(forward)
