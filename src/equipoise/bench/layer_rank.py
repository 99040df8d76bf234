"""What each rank does when a layer is measured: the sides of a case, in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.bench.layer_case import LayerCase, LayerMeasured, LayerSpec, SideName
from equipoise.bench.sides import (
    Exchange,
    Side,
    choose_wire,
    open_transformers,
    time_in_turns,
)
from equipoise.comm.groups import RankGroup
from equipoise.dispatch import create_dispatcher
from equipoise.dispatch.base import TokenDispatcher
from equipoise.dispatch.maps import PlacementMaps
from equipoise.errors import TransferError
from equipoise.load.recorder import LoadRecorder
from equipoise.models.experts import make_expert_parallel
from equipoise.placement import Placement, measure_balancedness, place_in_order, spread_load
from equipoise.policy import get_policy
from equipoise.topology import Topology

_TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02}


@dataclass(frozen=True)
class _Tokens:
    """One rank's: hidden_TD, expert_TK and weight_TK; load_E is that of all ranks, on the CPU."""

    hidden: Tensor
    experts: Tensor
    weights: Tensor
    load: Tensor


@dataclass(frozen=True)
class _Sides:
    """Attributes: by name what is timed, and the load of the busiest rank over the mean."""

    forward: dict[SideName, Side]
    imbalance: dict[SideName, float]


def measure_layer(spec: LayerSpec, group: RankGroup, emit: Callable[[LayerMeasured], None]) -> None:
    """Measure one case after the other.

    Args:
        spec: the same on every rank.
        group: its ranks.
        emit: called on rank 0 with each case's figures.
    Collective: every rank of the group.
    Raises: TransferError if the sides of a case differ, or a rank does not come in time;
        DependencyError if there is nothing to compare with.
    """
    if group.device.type == "cpu":
        # Ranks share the cores; threads of theirs would only wait for each other.
        torch.set_num_threads(1)
    weights = _make_weights(spec, group)
    with open_transformers(group, "peer") as make:
        peer = make(_make_own_experts(spec, group, weights))
        for case in spec.cases:
            tokens = _make_tokens(case, spec, group)
            with _open_sides(case, spec, group, weights, tokens, peer) as sides:
                _compare(spec, group, sides)
                seconds = time_in_turns(sides.forward, case.num_repeats, spec.num_rounds, group)
            if group.rank == 0:
                emit(LayerMeasured(case, choose_wire(group), seconds, sides.imbalance))


def _make_weights(spec: LayerSpec, group: RankGroup) -> dict[str, Tensor]:
    """All experts of the layer, the same on every rank."""
    size, dtype = spec.size, getattr(torch, spec.size.dtype)
    random = torch.Generator(group.device).manual_seed(spec.seed)
    shapes = {
        "gate_up_proj": (2 * size.expert_size, size.hidden_size),
        "down_proj": (size.hidden_size, size.expert_size),
    }
    weights = {}
    for name, shape in shapes.items():
        weights[name] = torch.empty(size.num_experts, *shape, dtype=dtype, device=group.device)
        # Outputs are about as large as inputs, so that errors show.
        weights[name].normal_(std=shape[1] ** -0.5, generator=random)
    return weights


def _make_tokens(case: LayerCase, spec: LayerSpec, group: RankGroup) -> _Tokens:
    size, dtype = spec.size, getattr(torch, spec.size.dtype)
    random = torch.Generator().manual_seed(1000 * spec.seed + group.rank)
    shape = (case.num_tokens, size.num_experts)
    scores = -torch.empty(shape).exponential_(generator=random).log()
    if case.routing == "skewed":
        # Popular experts lie side by side, as one in order on ranks meets them at the worst.
        scores -= spec.skew * torch.arange(1, size.num_experts + 1).log()
    experts = scores.topk(size.top_k).indices
    load = experts.flatten().bincount(minlength=size.num_experts)
    group.all_reduce(load, "sum")
    hidden = torch.randn(case.num_tokens, size.hidden_size, generator=random)
    weights = torch.rand(case.num_tokens, size.top_k, generator=random).softmax(1)
    return _Tokens(
        hidden.to(group.device, dtype),
        experts.to(group.device),
        weights.to(group.device, dtype),
        load,
    )


@contextmanager
def _open_sides(
    case: LayerCase,
    spec: LayerSpec,
    group: RankGroup,
    weights: dict[str, Tensor],
    tokens: _Tokens,
    peer: Exchange,
) -> Iterator[_Sides]:
    size = spec.size
    standing = place_in_order(1, size.num_experts, Topology(group.size, _per_rank(spec, 0)))
    load = tokens.load.numpy()[None]
    forward: dict[SideName, Side] = {
        "theirs": partial(peer, tokens.hidden, tokens.experts, tokens.weights)
    }
    placements: dict[SideName, Placement] = {"ours": standing}
    if "balanced" in case.sides:
        topology = Topology(group.size, _per_rank(spec, size.num_redundant))
        placements["balanced"] = get_policy("flow").place(load, topology)
    dispatchers: list[TokenDispatcher] = []
    for name, placement in placements.items():
        dispatchers.append(create_dispatcher("torch", group, placement.topology))
        forward[name] = _make_ours(spec, group, weights, tokens, placement, dispatchers[-1])
    imbalance = {
        name: float(1 / measure_balancedness(spread_load(load, placement))[0])
        for name, placement in placements.items()
    }
    yield _Sides(forward, imbalance | {"theirs": imbalance["ours"]})
    for dispatcher in dispatchers:
        dispatcher.close()


def _per_rank(spec: LayerSpec, num_redundant: int) -> int:
    return (spec.size.num_experts + num_redundant) // spec.num_ranks


def _make_experts(spec: LayerSpec, weights: dict[str, Tensor]) -> Any:
    """Qwen3-MoE's experts module of transformers over these weights."""
    family: Any = import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
    size = spec.size
    config = family.Qwen3MoeConfig(
        num_experts=size.num_experts,
        num_experts_per_tok=size.top_k,
        hidden_size=size.hidden_size,
        moe_intermediate_size=size.expert_size,
    )
    config._experts_implementation = spec.kernels
    with torch.device("meta"):
        experts = family.Qwen3MoeExperts(config)
    for name, weight in weights.items():
        setattr(experts, name, nn.Parameter(weight, requires_grad=False))
    return experts


def _make_own_experts(spec: LayerSpec, group: RankGroup, weights: dict[str, Tensor]) -> Any:
    """Those of this rank, as transformers has them once it has divided the experts."""
    count = _per_rank(spec, 0)
    mine = slice(group.rank * count, (group.rank + 1) * count)
    experts = _make_experts(spec, {name: weight[mine] for name, weight in weights.items()})
    experts.num_experts, experts._is_expert_parallel = count, True
    return experts


def _make_ours(
    spec: LayerSpec,
    group: RankGroup,
    weights: dict[str, Tensor],
    tokens: _Tokens,
    placement: Placement,
    dispatcher: TokenDispatcher,
) -> Side:
    maps = PlacementMaps(placement, group.device)
    recorder = LoadRecorder(1, placement.num_slots, group.device)
    model = nn.ModuleDict({"experts": _make_experts(spec, weights)})
    spread = make_expert_parallel(model, maps, group.rank, dispatcher, recorder)
    first = group.rank * tokens.hidden.shape[0]

    def forward() -> Tensor:
        with spread.route(None, first):
            output: Tensor = model["experts"](tokens.hidden, tokens.experts, tokens.weights)
        return output

    return forward


def _compare(spec: LayerSpec, group: RankGroup, sides: _Sides) -> None:
    wanted = sides.forward["theirs"]().float()
    for name, forward in sides.forward.items():
        error = float((forward().float() - wanted).norm() / wanted.norm())
        if not error <= _TOLERANCE[spec.size.dtype]:
            raise TransferError(
                f"rank {group.rank}: {name} is off transformers' output by {error:.2g}",
                rank=group.rank,
            )
