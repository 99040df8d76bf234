"""The spine: record -> (plan due?) -> plan -> transfer -> commit."""

from __future__ import annotations

import hashlib
import logging
import time

import numpy as np
import torch

from equipoise.balancer.model_state import EplbModelState
from equipoise.balancer.outcome import RebalanceOutcome
from equipoise.comm.base import EplbCommunicator, ExpertWeights
from equipoise.comm.groups import RankGroup
from equipoise.config import EPLBConfig
from equipoise.dispatch.maps import PlacementMaps
from equipoise.errors import ConfigError, MembershipError
from equipoise.load.recorder import LoadRecorder
from equipoise.load.window import LoadWindow
from equipoise.placement import Placement, measure_balancedness, spread_load
from equipoise.plan.transfer_plan import make_plan
from equipoise.policy.base import PlacementPolicy
from equipoise.topology import IntArray
from equipoise.transfer.executor import TransferStats, rearrange_expert_weights_inplace

logger = logging.getLogger(__name__)


class EplbState:
    """Keeps the experts of one or more models balanced over the ranks of a group.

    Owner: the forward thread of its rank; nothing else calls it.

    Args:
        config: the same on every rank.
        group: ranks that serve the experts, one generation.
        policy: makes placements; deterministic.
    """

    def __init__(self, config: EPLBConfig, group: RankGroup, policy: PlacementPolicy) -> None:
        self.config = config
        self.group = group
        self.policy = policy
        self.steps = 0
        self._models: dict[str, EplbModelState] = {}

    def add_model(
        self,
        name: str,
        expert_weights: ExpertWeights,
        maps: PlacementMaps,
        recorder: LoadRecorder,
        communicator: EplbCommunicator,
    ) -> EplbModelState:
        """Put a model under balance, before its first step.

        Args:
            name: not used by another model of this state.
            expert_weights: per MoE layer the tensors [S, ...] of this rank's slots.
            maps: its placement on the device.
            recorder: what its layers count tokens with.
            communicator: a wire that knows these weights.
        Collective: every rank of the group, models in the same order.
        Raises: ConfigError if the name is taken; MembershipError, on every rank, if ranks come
            with different configurations or placements.
        """
        if name in self._models:
            raise ConfigError(f"a model named {name!r} is already under balance")
        self._compare_over_ranks(name, maps.placement)
        window = LoadWindow(
            maps.placement.num_layers,
            maps.placement.num_experts,
            self.config.window_size,
            maps.slot_to_expert.device,
        )
        model = EplbModelState(name, expert_weights, maps, recorder, window, communicator)
        self._models[name] = model
        return model

    def step(self) -> tuple[RebalanceOutcome, ...]:
        """Close a forward pass: take its load, and rebalance when a plan is due.

        Returns:
            One outcome per model that a plan was made for; empty on most steps.
        Collective: every rank of the group, once after each forward pass.
        Raises: TransferError or MembershipError, on every rank concerned, within the deadline.
        """
        self.steps += 1
        for model in self._models.values():
            model.record_step()
        if self.config.log_balancedness:
            self._log_balancedness()
        return self.rearrange() if self.steps % self.config.step_interval == 0 else ()

    def rearrange(self) -> tuple[RebalanceOutcome, ...]:
        """Plan from the window's load now, and move experts.

        Returns:
            One outcome per model whose window has any load.
        Collective: every rank of the group, at the same step.
        Raises: as `step`.
        """
        outcomes = [self._rearrange_model(model) for model in self._models.values()]
        return tuple(outcome for outcome in outcomes if outcome is not None)

    def _rearrange_model(self, model: EplbModelState) -> RebalanceOutcome | None:
        started = time.perf_counter()
        load = self._sum_over_ranks(model.window.sum())
        if not load.any():
            return None
        standing = model.placement
        target = self.policy.place(load, standing.topology, standing=standing)
        plan = make_plan(standing, target)
        planned = time.perf_counter()
        stats = rearrange_expert_weights_inplace(
            standing,
            target,
            model.expert_weights,
            model.communicator,
            self.group,
            staging_bytes=self.config.staging_bytes,
            on_commit=lambda layers: model.maps.commit(target, layers),
            plan=plan,
        )
        sums, seconds = self._reduce_stats(stats, planned - started)
        outcome = RebalanceOutcome(
            model=model.name,
            step=self.steps,
            moves=plan.num_moves,
            local_moves=int(sums[0]),
            moves_per_layer=plan.moves_per_layer,
            bytes=int(sums[1]),
            plan_s=float(seconds[0]),
            transfer_s=float(seconds[1]),
            balancedness_before=measure_balancedness(spread_load(load, standing)),
            balancedness_after=measure_balancedness(spread_load(load, target)),
            placement=target,
        )
        if self.group.rank == 0:
            _log_outcome(outcome)
        return outcome

    def _reduce_stats(
        self, stats: TransferStats, plan_s: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sums = torch.tensor([stats.local_writes, stats.received_bytes])
        seconds = torch.tensor([plan_s, stats.transfer_s], dtype=torch.float64)
        self.group.all_reduce(sums, "sum")
        self.group.all_reduce(seconds, "max")
        return sums, seconds

    def _sum_over_ranks(self, load: torch.Tensor) -> IntArray:
        total = load.to("cpu", torch.int64, copy=True)
        self.group.all_reduce(total, "sum")
        return np.asarray(total.numpy())

    def _log_balancedness(self) -> None:
        for model in self._models.values():
            model.since_log += model.window.newest()
            if self.steps % self.config.log_balancedness_interval:
                continue
            load = self._sum_over_ranks(model.since_log)
            model.since_log.zero_()
            if self.group.rank == 0 and load.any():
                per_layer = measure_balancedness(spread_load(load, model.placement))
                logger.info(
                    "step %d, %s: balancedness %.3f (worst layer %.3f)",
                    self.steps,
                    model.name,
                    per_layer.mean(),
                    per_layer.min(),
                )

    def _compare_over_ranks(self, name: str, placement: Placement) -> None:
        said = (name, self.config.model_dump_json(), self.policy.name, placement.fingerprint())
        digest = hashlib.blake2b(repr(said).encode(), digest_size=8).digest()
        mine = torch.frombuffer(bytearray(digest), dtype=torch.int64)
        everybody = [int(theirs) for theirs in self.group.all_gather(mine)]
        different = [rank for rank, theirs in enumerate(everybody) if theirs != everybody[0]]
        if different:
            raise MembershipError(
                f"rank 0 and rank {', '.join(map(str, different))} add model {name!r} with "
                "different configurations, policies or placements; they must be the same"
            )


def _log_outcome(outcome: RebalanceOutcome) -> None:
    logger.info(
        "step %d, %s: %d experts received (%.1f MB) in %.3f s, planned in %.3f s; "
        "balancedness %.3f -> %.3f on the window's load",
        outcome.step,
        outcome.model,
        outcome.moves,
        outcome.bytes / 1e6,
        outcome.transfer_s,
        outcome.plan_s,
        outcome.balancedness_before.mean(),
        outcome.balancedness_after.mean(),
    )
