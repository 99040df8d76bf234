"""Rebalancing in the foreground: the forward thread does it all between two steps."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from equipoise.balancer.model_state import EplbModelState
from equipoise.balancer.outcome import RebalanceOutcome
from equipoise.balancer.planning import plan_moves
from equipoise.comm.groups import RankGroup
from equipoise.config import EPLBConfig
from equipoise.errors import EquipoiseError
from equipoise.placement import measure_balancedness, spread_load
from equipoise.plan.gate import MoveCosts
from equipoise.policy.base import PlacementPolicy
from equipoise.topology import IntArray
from equipoise.transfer.agreement import agree
from equipoise.transfer.executor import TransferStats, rearrange_expert_weights_inplace


class Foreground:
    """Plans, moves and commits before it returns. Owner: the forward thread.

    Args:
        group: ranks that serve the experts.
        config: balancing.
        policy: makes placements.
    """

    def __init__(self, group: RankGroup, config: EPLBConfig, policy: PlacementPolicy) -> None:
        self._group = group
        self._config = config
        self._policy = policy
        # What moves cost, once some were made.
        self._costs: MoveCosts | None = None

    def agree(self, models: Sequence[EplbModelState], step: int) -> None:
        """Return when every rank has come here, at the same step and with the same models.

        Collective: every rank of the group.
        Raises: TransferError if one differs; PlacementError if weights have moved in memory.
        """
        problem: Exception | None = None
        try:
            for model in models:
                model.check_storage()
        except EquipoiseError as error:
            problem = error
        facts = {"number of steps": str(step), "models": repr([model.name for model in models])}
        agree(self._group, facts, problem)

    def rearrange(self, model: EplbModelState, step: int) -> RebalanceOutcome | None:
        """Rebalance a model from its window's load.

        Returns:
            None if the window has no load.
        Collective: every rank of the group, after `agree`.
        Raises: TransferError if a peer fails; MembershipError if one does not come.
        """
        started = time.perf_counter()
        load = self._sum_over_ranks(model.window.sum())
        if not load.any():
            return None
        standing = model.placement
        plan = plan_moves(
            self._policy,
            load,
            standing,
            model.expert_bytes,
            self._config,
            self._costs,
            says=self._group.rank == 0,
        )
        target = plan.new
        planned = time.perf_counter()
        stats = rearrange_expert_weights_inplace(
            standing,
            target,
            model.expert_weights,
            model.communicator,
            self._group,
            staging_bytes=self._config.staging_bytes,
            on_commit=lambda layers: model.commit(target, layers),
            plan=plan,
            verify=self._config.verify,
        )
        sums, seconds = self._reduce_stats(stats, planned - started)
        outcome = RebalanceOutcome(
            model=model.name,
            planned_step=step,
            step=step,
            moves=plan.num_moves,
            local_moves=int(sums[0]),
            moves_per_layer=plan.moves_per_layer,
            bytes=int(sums[1]),
            plan_s=float(seconds[0]),
            transfer_s=float(seconds[1]),
            forward_s=time.perf_counter() - started,
            balancedness_before=measure_balancedness(spread_load(load, standing)),
            balancedness_after=measure_balancedness(spread_load(load, target)),
            placement=target,
        )
        if outcome.bytes:
            # The same on every rank; on average each receives its share.
            byte_s = outcome.transfer_s * self._group.size / outcome.bytes
            self._costs = MoveCosts(byte_s, layer_s=0.0)
        return outcome

    def _reduce_stats(
        self, stats: TransferStats, plan_s: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sums = torch.tensor([stats.local_writes, stats.received_bytes])
        seconds = torch.tensor([plan_s, stats.transfer_s], dtype=torch.float64)
        self._group.all_reduce(sums, "sum")
        self._group.all_reduce(seconds, "max")
        return sums, seconds

    def _sum_over_ranks(self, load: torch.Tensor) -> IntArray:
        total = load.to("cpu", torch.int64, copy=True)
        self._group.all_reduce(total, "sum")
        return np.asarray(total.numpy())
