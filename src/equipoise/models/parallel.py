"""One call makes a loaded model expert-parallel, and keeps it balanced."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from equipoise.balancer import EplbState, RebalanceOutcome
from equipoise.balancer.model_state import OnCommit
from equipoise.comm import create_eplb_communicator
from equipoise.comm.base import EplbCommunicator
from equipoise.comm.groups import RankGroup
from equipoise.config import EPLBConfig
from equipoise.dispatch import create_dispatcher
from equipoise.dispatch.base import TokenDispatcher
from equipoise.dispatch.maps import PlacementMaps
from equipoise.load.recorder import LoadRecorder
from equipoise.models.experts import ExpertParallelModel, count_experts, make_expert_parallel
from equipoise.placement import Placement, place_in_order
from equipoise.policy import get_policy
from equipoise.topology import Topology, choose_num_redundant


@dataclass(frozen=True)
class ParallelModel:
    """A model spread over ranks, and what balances it. Owner: the forward thread.

    Attributes:
        spread: the model with this rank's slots, its maps and its recorder.
        state: its balancer.
        dispatcher: what its tokens travel by.
        communicator: what its experts travel by.
    """

    spread: ExpertParallelModel
    state: EplbState
    dispatcher: TokenDispatcher
    communicator: EplbCommunicator

    @property
    def model(self) -> Any:
        """The Hugging Face model; a call takes part in an exchange per MoE layer."""
        return self.spread.model

    def route(
        self, valid: Tensor | None = None, first_position: int | None = None
    ) -> AbstractContextManager[Any]:
        """Tell the layers what the next forward pass is about.

        Args:
            valid: [T] bool over the flattened batch, False for padding, which is sent nowhere and
                not counted; None if all are tokens.
            first_position: global position of token 0, which replicas take turns by; None starts
                elsewhere at each step and on each rank.
        Returns:
            A context that gives the model, to be called inside.
        Collective: none; the call of the model is one of every rank.
        """
        if first_position is None:
            first_position = self.state.steps + self.state.group.rank
        return self.spread.route(valid, first_position)

    def step(self) -> tuple[RebalanceOutcome, ...]:
        """Close a forward pass, and rebalance when a plan is due; as `EplbState.step`."""
        return self.state.step()

    def close(self) -> None:
        """Stop balancing and release the wires; the group stays the caller's.

        Collective: every rank of the group, at the same step.
        """
        if self.state.close():
            self.communicator.close()
        self.dispatcher.close()


def parallelize(
    model: nn.Module,
    group: RankGroup,
    config: EPLBConfig | None = None,
    *,
    placement: Placement | None = None,
    on_commit: OnCommit | None = None,
) -> ParallelModel:
    """Spread the experts of a loaded Hugging Face model over a group, in place.

    Args:
        model: as transformers loads it, whole on every rank, on any device; it is moved to that of
            the group, experts slot by slot. After an error it is of no use.
        group: the ranks that serve it, each with its own requests.
        config: the same on every rank; None for the defaults.
        placement: to begin with, also of several nodes; None for experts in order on one node,
            with as many redundant ones as the configuration says.
        on_commit: as for `EplbState.add_model`.
    Collective: every rank of the group.
    Raises: ModelError if the model has no experts that can be taken over; ConfigError,
        PlacementError or CommunicatorUnavailable if the configuration cannot be followed;
        TransferError or MembershipError if ranks differ or one does not come.
    """
    config = config or EPLBConfig()
    policy = get_policy(config.policy)
    if placement is None:
        placement = _place(model, group, config)
    dispatcher = create_dispatcher("torch", group, placement.topology)
    recorder = LoadRecorder(placement.num_layers, placement.num_slots, group.device)
    maps = PlacementMaps(placement, group.device)
    spread = make_expert_parallel(model, maps, group.rank, dispatcher, recorder)
    state = EplbState(config, group, policy)
    communicator = create_eplb_communicator(
        state.transfer_group, config.communicator, spread.expert_weights
    )
    parallel = ParallelModel(spread, state, dispatcher, communicator)
    try:
        state.add_model(
            "model", spread.expert_weights, maps, recorder, communicator, on_commit=on_commit
        )
    except BaseException:
        parallel.close()
        raise
    return parallel


def _place(model: nn.Module, group: RankGroup, config: EPLBConfig) -> Placement:
    num_layers, num_experts = count_experts(model)
    requested = config.num_redundant_experts
    num_redundant = choose_num_redundant(
        num_experts, group.size, None if requested == "auto" else requested
    )
    topology = Topology(group.size, (num_experts + num_redundant) // group.size)
    return place_in_order(num_layers, num_experts, topology)
