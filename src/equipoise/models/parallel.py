"""One call makes a model expert-parallel, and keeps it balanced."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
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
from equipoise.dispatch.turns import ReplicaChoice
from equipoise.errors import ConfigError, ModelError
from equipoise.load.recorder import LoadRecorder
from equipoise.models.checkpoint import Checkpoint, Progress
from equipoise.models.contract import ExpertLayer
from equipoise.models.experts import (
    ExpertParallelModel,
    SetPlan,
    WholeModel,
    find_expert_sets,
    take_over,
)
from equipoise.models.export import write_checkpoint
from equipoise.models.generation import Lockstep
from equipoise.models.host_copies import (
    CopyKey,
    CopyRule,
    HostBackup,
    HostCopies,
    assign_copies,
)
from equipoise.models.loading import load_spread
from equipoise.models.quantised import check_kernels
from equipoise.placement import Placement, place_in_order
from equipoise.policy import get_policy
from equipoise.topology import Topology, choose_num_redundant

MakeDispatcher = Callable[[RankGroup, Topology], TokenDispatcher]
"""Called on every rank of the group."""


@dataclass(frozen=True)
class ParallelModel:
    """A model spread over ranks, and what balances it. Owner: the forward thread.

    Attributes:
        spread: the model with this rank's slots, its maps and its recorder.
        state: its balancer.
        dispatchers: what its tokens travel by, one for each set of layers.
        communicators: what its experts travel by, one for each set of layers.
        checkpoint: where the model was read from, to read single experts again; None if it was
            given whole.
        on_commit: what the engine does with slots that have switched, or None.
        copies: experts that this rank keeps in host memory for others.
    """

    spread: ExpertParallelModel
    state: EplbState
    dispatchers: tuple[TokenDispatcher, ...]
    communicators: tuple[EplbCommunicator, ...]
    checkpoint: Checkpoint | None = None
    on_commit: OnCommit | None = None
    copies: HostCopies = field(default_factory=HostCopies)

    @property
    def model(self) -> Any:
        """The Hugging Face model; a call takes part in an exchange per MoE layer."""
        return self.spread.model

    def route(
        self, valid: Tensor | None = None, first_position: int | Tensor | None = None
    ) -> AbstractContextManager[Any]:
        """Tell the layers what the next forward pass is about.

        Args:
            valid: [T] bool over the flattened batch, False for padding, which is sent nowhere and
                not counted; None if all are tokens.
            first_position: global position of token 0, which replicas take turns by; None starts
                elsewhere at each step and on each rank; a 0-d int64 tensor on the device where a
                graph is captured.
        Returns:
            A context that gives the model, to be called inside.
        Collective: none; the call of the model is one of every rank.
        """
        if first_position is None:
            first_position = self.state.steps + self.state.group.rank
        return self.spread.route(valid, first_position)

    def step(self) -> tuple[RebalanceOutcome, ...]:
        """Close a forward pass, and rebalance when a plan is due; as `EplbState.step`."""
        outcomes = self.state.step()
        if outcomes:
            self.copies.follow([one.maps.placement for one in self.spread.sets])
        return outcomes

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The `generate` of transformers on every rank with its own batch, balancing as it goes.

        Ranks need not generate as many tokens: those that are through keep step. A rank without
        requests passes nothing. Padding, by the attention mask, is sent nowhere.

        Args:
            args: as for `model.generate`.
            kwargs: as for `model.generate`; `step` is called after each call of the model.
        Returns:
            What `model.generate` returns; None if nothing was passed.
        Collective: every rank of the group; within, each call of the model.
        Raises: TransferError or MembershipError within the deadline if a rank does not take part,
            and whatever `model.generate` raises.
        """
        with self.lockstep() as model:
            return model.generate(*args, **kwargs) if args or kwargs else None

    def lockstep(self) -> AbstractContextManager[Any]:
        """Have ranks call the model as often as each likes; those that are through keep step.

        `route` and `step` are called for each call of the model, which may have hooks, and any
        arguments that transformers knows.

        Returns:
            A context that gives the model.
        Collective: every rank of the group, once; within, each call of the model.
        """
        state = self.state
        return Lockstep(
            self.spread, state.group, self.step, lambda: state.steps + state.group.rank
        ).serve()

    def to_checkpoint(self, directory: str | Path) -> None:
        """Write the logical model as a checkpoint, each expert once.

        Tensors have the names, dtypes and bytes of the checkpoint that the model was read from; the
        files beside them are copied. It is written under another name and renamed when it is whole.

        Args:
            directory: of a file system that every rank sees; must not be there yet.
        Collective: every rank of the group, at the same step.
        Raises: ModelError on every rank if it cannot be written, or the model does not hold what
            the checkpoint did: it was dequantised, or read in a narrower dtype.
        """
        write_checkpoint(self.spread, self.state.group, Path(directory), self.checkpoint)

    def close(self) -> None:
        """Stop balancing and release the wires; the group stays the caller's.

        Collective: every rank of the group, at the same step.
        """
        if self.state.close():
            for communicator in self.communicators:
                communicator.close()
        for dispatcher in self.dispatchers:
            dispatcher.close()


@torch.inference_mode(False)  # Steps write what is made here, in and out of inference mode.
def parallelize(
    model: nn.Module | str | Path,
    group: RankGroup,
    config: EPLBConfig | None = None,
    *,
    placement: Placement | None = None,
    num_nodes: int = 1,
    on_commit: OnCommit | None = None,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
    dequantize: bool = False,
    progress: Progress | None = None,
    dispatcher: MakeDispatcher | None = None,
    replicas: Callable[[int], ReplicaChoice] | None = None,
) -> ParallelModel:
    """Spread the experts of a Hugging Face model over a group.

    Args:
        model: the directory of a checkpoint, of which each rank reads its own experts and what all
            have; or a model as transformers loads it, whole on every rank, on any device: it is
            taken over in place, moved to the group's device, and of no use after an error.
        group: the ranks that serve it, each with its own requests.
        config: the same on every rank; None for the defaults.
        placement: to begin with; None for experts in order, redundant ones as configured.
        num_nodes: that the ranks are spread over evenly, node by node; a placement says it itself.
        on_commit: as for `EplbState.add_model`; layers are numbered as the model has them.
        dtype: of the weights of a checkpoint; None for that of its configuration.
        attention: transformers' attention implementation for a checkpoint; None lets it choose.
        dequantize: whether quantised weights of a checkpoint become floating point as they are
            read; on a CPU they always do.
        progress: told of the bytes read of a checkpoint, and of those due; from any thread.
        dispatcher: makes what tokens travel by, once for each set of layers; None for `torch`.
        replicas: makes, from this rank, the choice of the replica that a token goes to, like
            `NearestReplicas`; None for `SpreadReplicas`, to which a change of ranks returns.
    Collective: every rank of the group.
    Raises: ModelError if the model has no experts that can be taken over, or the checkpoint is not
        whole; ConfigError, PlacementError or CommunicatorUnavailable if the configuration cannot
        be followed; TransferError or MembershipError if ranks differ or one does not come.
    """
    config = config or EPLBConfig()
    get_policy(config.policy)
    initial = num_nodes if placement is None else placement

    def plan(whole: nn.Module) -> list[SetPlan]:
        plans = _plan_sets(find_expert_sets(whole), group, config, initial, dispatcher)
        return _choose_replicas(plans, group, replicas)

    if isinstance(model, nn.Module):
        if dtype is not None or attention is not None or dequantize or progress is not None:
            raise ConfigError(
                "dtype, attention, dequantize and progress are of a checkpoint, not of a model"
            )
        spread = take_over(model, plan(model), group.rank, WholeModel())
        model.to(group.device)
        return assemble(spread, group, config, None, on_commit)
    checkpoint = Checkpoint(Path(model), dtype, group.device, attention, dequantize=dequantize)
    if checkpoint.is_quantised:
        check_kernels(checkpoint.model)
    spread = load_spread(checkpoint, plan(checkpoint.model), group, progress)
    return assemble(spread, group, config, checkpoint, on_commit)


def assemble(
    spread: ExpertParallelModel,
    group: RankGroup,
    config: EPLBConfig,
    checkpoint: Checkpoint | None = None,
    on_commit: OnCommit | None = None,
    copies: HostCopies | None = None,
) -> ParallelModel:
    """Put a spread model under balance, over the wires of one generation.

    Args:
        spread: need not be bound yet.
        group: the generation's.
        config: the same on every rank.
        checkpoint: where the model was read from.
        on_commit: as for `parallelize`.
        copies: experts that this rank keeps in host memory.
    Collective: every rank of the group; any thread, before the first step.
    Raises: as `parallelize`; what was made is closed then.
    """
    state = EplbState(config, group, get_policy(config.policy))
    communicators: list[EplbCommunicator] = []
    try:
        # One by one: those that were made before another fails are closed.
        communicators.extend(
            create_eplb_communicator(
                state.transfer_group,
                config.communicator,
                one.weights,
                nccl_max_ctas=config.nccl_max_ctas,
            )
            for one in spread.sets
        )
        parallel = ParallelModel(
            spread,
            state,
            tuple(one.dispatcher for one in spread.sets),
            tuple(communicators),
            checkpoint,
            on_commit,
            copies or HostCopies(),
        )
        _add_models(parallel)
    except BaseException:
        state.close()
        for communicator in communicators:
            communicator.close()
        for one in spread.sets:
            one.dispatcher.close()
        raise
    return parallel


def keep_copies(parallel: ParallelModel, backup: HostBackup) -> ParallelModel:
    """Read the experts that this rank keeps in host memory, of a model that was read just now.

    Args:
        parallel: of a checkpoint.
        backup: which experts; the same on every rank.
    Returns:
        The same model, with its copies.
    Collective: none.
    Raises: ModelError if the model was not read from a checkpoint, or that cannot be read.
    """
    if backup == "none":
        return parallel
    if parallel.checkpoint is None:
        raise ModelError("host_backup needs a model that was read from a checkpoint")
    group = parallel.state.group
    placements = [one.maps.placement for one in parallel.spread.sets]
    kept_by = assign_copies(placements, backup, [()] * group.size)
    read = partial(read_copy, parallel.spread, parallel.checkpoint)
    kept = {key: read(key) for key in kept_by[group.rank]}
    parallel.checkpoint.close()
    return replace(parallel, copies=HostCopies(kept, CopyRule(backup, group.rank, kept_by, read)))


def read_copy(spread: ExpertParallelModel, checkpoint: Checkpoint, key: CopyKey) -> list[Tensor]:
    """Read an expert into host memory, as slots have it.

    Args:
        spread: whose layers say what it is like.
        checkpoint: that the model was read from.
        key: which.
    Collective: none.
    Raises: ModelError if it cannot be read.
    """
    one = spread.sets[key.set]
    read = checkpoint.read_expert(one.layers[key.layer], key.expert)
    return [
        tensor.to("cpu", like.dtype, copy=True)
        for tensor, like in zip(read, one.weights[key.layer], strict=True)
    ]


def _plan_sets(
    sets: list[list[ExpertLayer]],
    group: RankGroup,
    config: EPLBConfig,
    initial: Placement | int,
    dispatcher: MakeDispatcher | None,
) -> list[SetPlan]:
    """How layers are spread; `initial` is where experts begin, or over how many nodes."""
    if isinstance(initial, Placement) and len(sets) > 1:
        counts = " or ".join(str(layers[0].num_experts) for layers in sets)
        raise ModelError(
            f"the model's MoE layers have {counts} experts, so that one placement cannot speak of "
            "all: leave it out"
        )
    return [_plan(layers, group, config, initial, dispatcher) for layers in sets]


def _plan(
    layers: list[ExpertLayer],
    group: RankGroup,
    config: EPLBConfig,
    initial: Placement | int,
    dispatcher: MakeDispatcher | None,
) -> SetPlan:
    if isinstance(initial, Placement):
        placement = initial
    else:
        requested = config.num_redundant_experts
        num_experts = layers[0].num_experts
        num_redundant = choose_num_redundant(
            num_experts, group.size, None if requested == "auto" else requested
        )
        topology = Topology(group.size, (num_experts + num_redundant) // group.size, initial)
        placement = place_in_order(len(layers), num_experts, topology)
    make = dispatcher or partial(create_dispatcher, "torch")
    return SetPlan(
        layers=layers,
        maps=PlacementMaps(placement, group.device),
        dispatcher=make(group, placement.topology),
        recorder=LoadRecorder(placement.num_layers, placement.num_slots, group.device),
    )


def _choose_replicas(
    plans: list[SetPlan], group: RankGroup, replicas: Callable[[int], ReplicaChoice] | None
) -> list[SetPlan]:
    if replicas is None:
        return plans
    choice = replicas(group.rank)
    return [
        replace(plan, maps=PlacementMaps(plan.maps.placement, group.device, choice))
        for plan in plans
    ]


def _add_models(parallel: ParallelModel) -> None:
    """Each set of layers is a model to the balancer."""
    sets, on_commit = parallel.spread.sets, parallel.on_commit
    order = [layer.name for one in sets for layer in one.layers]
    positions = {
        name: position
        for position, name in enumerate(
            name for name, _ in parallel.model.named_modules() if name in set(order)
        )
    }
    for one, communicator in zip(sets, parallel.communicators, strict=True):
        name = "model" if len(sets) == 1 else f"model/{one.maps.placement.num_experts}"
        numbers = [positions[layer.name] for layer in one.layers]
        parallel.state.add_model(
            name,
            one.weights,
            one.maps,
            one.recorder,
            communicator,
            on_commit=None if on_commit is None else _number(on_commit, numbers),
        )


def _number(on_commit: OnCommit, numbers: list[int]) -> OnCommit:
    return lambda layer, slots: on_commit(numbers[layer], slots)
