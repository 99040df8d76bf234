"""What each rank does when dispatchers are measured: both sides of a case, in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
from torch import Tensor

from equipoise.bench.dispatch_case import (
    DispatchCase,
    DispatchLeftOut,
    DispatchMeasured,
    DispatchSaid,
    DispatchSpec,
)
from equipoise.bench.sides import (
    NUM_WARM_UPS,
    Side,
    choose_wire,
    open_transformers,
    time_in_turns,
)
from equipoise.comm.groups import RankGroup
from equipoise.dispatch import create_dispatcher
from equipoise.dispatch.nixl_ep.kernels import Buffer
from equipoise.dispatch.rows import dequant_fp8
from equipoise.errors import CommunicatorUnavailable, DependencyError, TransferError
from equipoise.topology import Topology


@dataclass(frozen=True)
class _Tokens:
    """One rank's: hidden_TD bfloat16, expert_TK and weight_TK."""

    hidden: Tensor
    experts: Tensor
    weights: Tensor


@dataclass(frozen=True)
class _Sides:
    """Dispatches and combines, the experts being the identity.

    Attributes: what is timed, over what, and what gives right sums.
    """

    ours: Side
    theirs: Side
    wire: str
    exact: Mapping[str, Side]


def measure_dispatch(
    spec: DispatchSpec, group: RankGroup, emit: Callable[[DispatchSaid], None]
) -> None:
    """Measure one case after the other.

    Args:
        spec: the same on every rank.
        group: its ranks.
        emit: called on rank 0 with each case's figures.
    Collective: every rank of the group.
    Raises: TransferError if the two sides of a case differ, or a rank does not come in time.
    """
    if group.device.type == "cpu":
        # Ranks share the cores; threads of theirs would only wait for each other.
        torch.set_num_threads(1)
    for case in spec.cases:
        open_sides = _open_torch if case.backend == "torch" else _open_nixl_ep
        tokens = _make_tokens(case, spec, group)
        try:
            with torch.no_grad(), open_sides(case, group, tokens) as sides:
                said: DispatchSaid = _measure(case, spec, group, tokens, sides)
        except (CommunicatorUnavailable, DependencyError) as error:
            said = DispatchLeftOut(case, str(error))
        # What rank 0 tells of is a case that no rank can fail any more.
        group.barrier()
        if group.rank == 0:
            emit(said)


def _make_tokens(case: DispatchCase, spec: DispatchSpec, group: RankGroup) -> _Tokens:
    random = torch.Generator().manual_seed(1000 * spec.seed + group.rank)
    shape = (case.num_tokens, case.top_k)
    scores = torch.rand(case.num_tokens, case.num_experts, generator=random)
    return _Tokens(
        torch.randn(case.num_tokens, case.hidden_size, generator=random)
        .bfloat16()
        .to(group.device),
        scores.topk(case.top_k).indices.to(group.device),
        torch.rand(shape, generator=random).softmax(1).bfloat16().to(group.device),
    )


def _measure(
    case: DispatchCase, spec: DispatchSpec, group: RankGroup, tokens: _Tokens, sides: _Sides
) -> DispatchMeasured:
    expected = tokens.hidden.float() * tokens.weights.float().sum(1, keepdim=True)
    for name, side in sides.exact.items():
        error = float((side().float() - expected).norm() / expected.norm())
        if error > 0.05:
            raise TransferError(
                f"rank {group.rank}: {case.backend}, {name}: what came home is off by {error:.3f}",
                rank=group.rank,
            )
    seconds = time_in_turns(
        {"theirs": sides.theirs, "ours": sides.ours}, case.num_repeats, spec.num_rounds, group
    )
    return DispatchMeasured(case, sides.wire, seconds["ours"], seconds["theirs"])


def _capture(side: Side, group: RankGroup) -> Side:
    """The same as a graph, replayed."""
    for _ in range(NUM_WARM_UPS):
        side()
    torch.cuda.synchronize()
    group.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        combined = side()

    def replay() -> Tensor:
        graph.replay()
        return combined

    return replay


@contextmanager
def _open_torch(case: DispatchCase, group: RankGroup, tokens: _Tokens) -> Iterator[_Sides]:
    with open_transformers(group, f"peer/{case.num_tokens}") as make:
        slots_per_rank = case.num_experts // group.size
        peer = make(_Identity(slots_per_rank))
        dispatcher = create_dispatcher("torch", group, Topology(group.size, slots_per_rank))

        def ours() -> Tensor:
            dispatched = dispatcher.dispatch(tokens.hidden, tokens.experts)
            return dispatcher.combine(dispatched.hidden_ND, tokens.weights, dispatched)

        theirs = partial(peer, tokens.hidden, tokens.experts, tokens.weights)
        yield _Sides(ours, theirs, choose_wire(group), {"ours": ours, "theirs": theirs})


class _Identity(torch.nn.Module):
    """Experts that take no time: what is left is dispatch and combine."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def forward(self, hidden_states: Tensor, *_: Tensor) -> Tensor:
        return hidden_states


@contextmanager
def _open_nixl_ep(case: DispatchCase, group: RankGroup, tokens: _Tokens) -> Iterator[_Sides]:
    from equipoise.dispatch.nixl_ep.all_to_all import NixlEPAll2AllManager
    from equipoise.dispatch.nixl_ep.dispatcher import NixlEPDispatcher, NixlEPOptions

    fp8 = "FP8" in case.backend
    manager = NixlEPAll2AllManager(
        group.size, group.device, min(group.timeout, timedelta(seconds=20))
    )
    try:
        options = NixlEPOptions(
            manager, case.num_tokens, case.hidden_size, "float32" if fp8 else "no"
        )
        dispatcher = NixlEPDispatcher(
            group, Topology(group.size, case.num_experts // group.size), options
        )
        dispatcher.enter()
        weights = tokens.weights.float()
        # As the recorder's kernel makes them.
        index = tokens.experts.to(dispatcher.slot_dtype)
        max_tokens = dispatcher.shape.max_tokens
        # Kernels lay rows in any order, so outputs go with their own dispatch. Dequantising is the
        # experts', and not what is timed: there, outputs are of the right shape alone.
        sent = dispatcher.send(tokens.hidden, index)
        sent.receive()
        timed = torch.zeros_like(sent.blocks.hidden_SCH)
        dispatcher.send_home(timed, weights, sent.blocks).receive()

        def ours(exact: bool) -> Tensor:
            sent = dispatcher.send(tokens.hidden, index)
            sent.receive()
            outputs = sent.blocks.hidden_SCH if exact or not fp8 else timed
            home = dispatcher.send_home(outputs, weights, sent.blocks)
            home.receive()
            return home.combined_TD

        with manager.lend() as buffer:
            theirs = partial(
                _call_kernels, buffer, tokens, index, weights, max_tokens, timed if fp8 else None
            )
            sides: list[Side] = [partial(ours, False), partial(theirs, False)]
            exact = {"ours": partial(ours, True), "theirs": partial(theirs, True)}
            if case.captured:
                sides = [_capture(side, group) for side in sides]
            yield _Sides(sides[0], sides[1], "NIXL-EP", exact)
            group.barrier()
    finally:
        manager.close()


def _call_kernels(
    buffer: Buffer,
    tokens: _Tokens,
    index: Tensor,
    weights: Tensor,
    max_tokens: int,
    fp8_outputs: Tensor | None,
    exact: bool,
) -> Tensor:
    """The bare kernels; where rows come as FP8, dequantised or with other outputs."""
    is_fp8 = fp8_outputs is not None
    received, _, handle, _, hook = buffer.low_latency_dispatch(
        tokens.hidden, index, max_tokens, use_fp8=is_fp8, return_recv_hook=True
    )
    assert hook is not None
    hook()
    outputs = received
    if is_fp8:
        outputs = dequant_fp8(*received) if exact else fp8_outputs
    combined, _, hook = buffer.low_latency_combine(
        outputs, index, weights, handle, return_recv_hook=True
    )
    assert hook is not None
    hook()
    return combined
