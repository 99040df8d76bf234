"""The spine: record -> (plan due?) -> plan -> transfer -> commit."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch

from equipoise.balancer.model_state import EplbModelState, OnCommit
from equipoise.balancer.outcome import RebalanceOutcome
from equipoise.balancer.stats import EplbStats
from equipoise.comm.base import EplbCommunicator, ExpertWeights
from equipoise.comm.groups import RankGroup
from equipoise.config import EPLBConfig
from equipoise.dispatch.maps import PlacementMaps
from equipoise.errors import ConfigError, DependencyError, EquipoiseError, PlacementError
from equipoise.load.recorder import LoadRecorder
from equipoise.load.window import LoadWindow
from equipoise.placement import measure_balancedness, spread_load
from equipoise.plan.transfer_plan import make_plan
from equipoise.policy.base import PlacementPolicy
from equipoise.topology import IntArray
from equipoise.transfer.agreement import agree
from equipoise.transfer.executor import (
    TransferStats,
    check_fit,
    rearrange_expert_weights_inplace,
)

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.registry import Collector

logger = logging.getLogger(__name__)


class EplbState:
    """Keeps the experts of one or more models balanced over the ranks of a group.

    Owner: the forward thread of its rank, which makes every call; only `stats` may be called from
    any thread.

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
        self._listeners: list[Callable[[RebalanceOutcome], None]] = []
        # Guards what `stats` reads.
        self._lock = threading.Lock()

    def add_model(
        self,
        name: str,
        expert_weights: ExpertWeights,
        maps: PlacementMaps,
        recorder: LoadRecorder,
        communicator: EplbCommunicator,
        *,
        on_commit: OnCommit | None = None,
    ) -> EplbModelState:
        """Put a model under balance, before its first step.

        Args:
            name: not used by another model of this state.
            expert_weights: per MoE layer the tensors [S, ...] of this rank's slots, contiguous,
                each with memory of its own that it keeps.
            maps: its placement on the device.
            recorder: what its layers count tokens with.
            communicator: a wire that knows these weights.
            on_commit: called on the forward thread with a layer and its local slots [n] int64
                that hold another expert now, after slots and maps have switched and before the
                next forward pass, so that the engine makes anew what it derived from the weights.
                What it raises ends `step`, on this rank alone.
        Collective: every rank of the group, models in the same order.
        Raises: ConfigError if the name is taken; PlacementError, naming the layer and the tensor,
            if weights, recorder or maps do not fit each other; TransferError, on every other
            rank, if one has such a problem, and on every rank if they come with different
            configurations, placements or weights; MembershipError if one does not come.
        """
        problem: Exception | None = None
        try:
            if name in self._models:
                raise ConfigError(f"a model named {name!r} is already under balance")
            check_fit(maps.placement, expert_weights, self.group)
            _check_recorder(recorder, maps)
        except EquipoiseError as error:
            problem = error
        agree(self.group, self._collect_facts(name, expert_weights, maps), problem)
        model = EplbModelState(
            name,
            expert_weights,
            maps,
            recorder,
            LoadWindow(
                maps.placement.num_layers,
                maps.placement.num_experts,
                self.config.window_size,
                recorder.counts.device,
            ),
            communicator,
            self.group.rank,
            on_commit,
        )
        with self._lock:
            self._models[name] = model
        return model

    def _collect_facts(
        self, name: str, expert_weights: ExpertWeights, maps: PlacementMaps
    ) -> dict[str, str]:
        """What ranks must agree on to balance a model together."""
        shapes = [[(list(t.shape), str(t.dtype)) for t in layer] for layer in expert_weights]
        return {
            "model name": name,
            "configuration": self.config.model_dump_json(),
            "policy": self.policy.name,
            "placement": maps.placement.fingerprint(),
            "weights": repr(shapes),
        }

    def add_listener(self, listener: Callable[[RebalanceOutcome], None]) -> None:
        """Tell this listener, too, of every rebalance.

        Args:
            listener: called on the forward thread, on this rank, once all models' experts are
                where they go.
        Collective: none.
        """
        self._listeners.append(listener)

    def stats(self) -> EplbStats:
        """Figures of this moment; any thread may ask. Collective: none."""
        with self._lock:
            figures = {model.name: model.stats for model in self._models.values()}
            return EplbStats(self.steps, MappingProxyType(figures))

    def register_metrics(self, registry: CollectorRegistry) -> Collector:
        """Have the caller's Prometheus registry read `stats` when it is scraped.

        Returns:
            what `registry.unregister` takes; until then the registry keeps this state alive.
        Collective: none; all figures but steps are the same on every rank.
        Raises: DependencyError without prometheus-client; ValueError if the registry has metrics
            of these names.
        """
        try:
            from equipoise.balancer.metrics import register_stats
        except ImportError as error:
            raise DependencyError(
                "metrics need prometheus-client: pip install 'equipoise[metrics]'"
            ) from error
        return register_stats(registry, self.stats)

    def step(self) -> tuple[RebalanceOutcome, ...]:
        """Close a forward pass: take its load, and rebalance when a plan is due.

        A rank without requests calls it as often as the others: its forward pass is a dummy whose
        tokens are padding, so it takes part in dispatch and adds nothing to the load.

        Returns:
            One outcome per model that a plan was made for; empty on most steps.
        Collective: every rank of the group, once after each forward pass.
        Raises: TransferError or MembershipError, on every rank concerned, within the deadline;
            PlacementError if weights have moved in memory.
        """
        with self._lock:
            self.steps += 1
        for model in self._models.values():
            model.record_step()
        if self.config.log_balancedness:
            self._log_balancedness()
        return self.rearrange() if self.steps % self.config.step_interval == 0 else ()

    def rearrange(self, *, is_profile: bool = False) -> tuple[RebalanceOutcome, ...]:
        """Plan from the window's load now, and move experts.

        Args:
            is_profile: change nothing, but take the buffers that a real call may need, so that
                memory profiling sees them.
        Returns:
            One outcome per model whose window has any load; none of a profile pass.
        Collective: every rank of the group, at the same step.
        Raises: as `step`; TransferError if ranks come at different steps or with different models.
        """
        self._agree_to_move()
        if is_profile:
            for model in self._models.values():
                rearrange_expert_weights_inplace(
                    model.placement,
                    model.placement,
                    model.expert_weights,
                    model.communicator,
                    self.group,
                    staging_bytes=self.config.staging_bytes,
                    is_profile=True,
                )
            return ()
        told = [self._rearrange_model(model) for model in self._models.values()]
        outcomes = tuple(outcome for outcome in told if outcome is not None)
        # Only now: a listener that raises shall not keep this rank from what others move.
        for outcome in outcomes:
            for listener in self._listeners:
                listener(outcome)
        return outcomes

    def _agree_to_move(self) -> None:
        problem: Exception | None = None
        try:
            for model in self._models.values():
                model.check_storage()
        except EquipoiseError as error:
            problem = error
        facts = {"number of steps": str(self.steps), "models": repr(list(self._models))}
        agree(self.group, facts, problem)

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
            on_commit=lambda layers: model.commit(target, layers),
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
        with self._lock:
            model.stats = model.stats.add(outcome)
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


def _check_recorder(recorder: LoadRecorder, maps: PlacementMaps) -> None:
    counted, placed = list(recorder.counts.shape), list(maps.slot_to_expert.shape)
    if counted != placed:
        raise PlacementError(
            f"the recorder counts [layers, slots] {counted}, the placement has {placed}"
        )
    if recorder.counts.device != maps.slot_to_expert.device:
        raise PlacementError(
            f"the recorder is on {recorder.counts.device}, the maps are on "
            f"{maps.slot_to_expert.device}: both must be where tokens are routed"
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
