"""Playing a trace against a policy: plans see the past alone, steps that follow judge them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from equipoise.errors import ConfigError, TraceError
from equipoise.load.trace import LoadTrace
from equipoise.placement import Placement, measure_balancedness, place_in_order, spread_load
from equipoise.plan.transfer_plan import make_plan
from equipoise.policy.base import PlacementPolicy
from equipoise.sim.cost import CostModel
from equipoise.sim.policies import FlowChoices, make_policy
from equipoise.sim.proposal import count_matched
from equipoise.topology import FloatArray, IntArray, Topology

IN_ORDER = "in-order"
CHUNK_ENTRIES = 1_000_000
"""Slot loads spread at once, 8 bytes each, several times over."""


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """What is played.

    Attributes:
        policy: its name, or "in-order" for experts in order that are never moved.
        topology: ranks, nodes and slots.
        interval_steps: steps between plans; None for one plan at the start and no other.
        move_budget: experts received per plan as a fraction of slots, for a policy that takes it.
    """

    policy: str
    topology: Topology
    interval_steps: int | None = None
    move_budget: float | None = None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all configurations of a replay share.

    Attributes:
        cost: of steps and rebalances.
        warm_up_steps: steps before the first plan; seen by it, and judged in nobody.
        window_steps: steps whose load a plan sees at most; None for those since the last plan.
        num_groups: equal groups that consecutive experts form.
    """

    cost: CostModel
    warm_up_steps: int
    window_steps: int | None = None
    num_groups: int = 1


@dataclass(frozen=True, kw_only=True)
class Rebalance:
    """One plan and the steps that followed it.

    Attributes:
        step: before which it took force.
        num_steps: that it was in force.
        received: experts that ranks received from each other.
        received_matched: how many it would be if ranks had been renamed after what stood.
        bytes: that travelled.
        lost_s: seconds that serving stopped.
        planned: balancedness of the window's load on the new placement, mean over layers.
        following: the same for the sum of the steps that it was in force.
    """

    step: int
    num_steps: int
    received: int
    received_matched: int
    bytes: int
    lost_s: float
    planned: float
    following: float


@dataclass(frozen=True, eq=False)
class Outcome:
    """How a configuration fared on the steps after the warm-up.

    Attributes:
        configuration: what was played.
        start: the plan that the warm-up gave, from nothing: where the deployment begins. What it
            moves is counted in none of the sums. None for experts in order.
        rebalances: the plans after it.
        mean: [N, L] float64, tokens of the mean rank; N steps after the warm-up.
        most: [N, L] float64, tokens of the slowest rank.
        rank_load: [L, R] float64, tokens per rank over those steps.
        step_s: [N] float64, seconds of each step.
    """

    configuration: Configuration
    start: Rebalance | None
    rebalances: tuple[Rebalance, ...]
    mean: FloatArray
    most: FloatArray
    rank_load: FloatArray
    step_s: FloatArray

    @cached_property
    def realised(self) -> float:
        """Mean over slowest rank's tokens, summed over steps and layers: what time follows."""
        return float(self.mean.sum() / self.most.sum())

    @property
    def per_step(self) -> FloatArray:
        """[N] float64, `realised` of each step; 1 where nothing was served."""
        most: FloatArray = self.most.sum(axis=1)
        mean: FloatArray = self.mean.sum(axis=1)
        return np.where(most > 0, mean / np.where(most > 0, most, 1.0), 1.0)

    @property
    def planned(self) -> float | None:
        """Mean over all plans; None without one."""
        plans = self._plans()
        return float(np.mean([one.planned for one in plans])) if plans else None

    @property
    def following(self) -> float | None:
        """Mean over all plans, by the steps that each was in force; None without one."""
        plans = self._plans()
        if not plans:
            return None
        weights = [one.num_steps for one in plans]
        return float(np.average([one.following for one in plans], weights=weights))

    @property
    def received(self) -> int:
        """Experts received over all rebalances."""
        return sum(one.received for one in self.rebalances)

    @property
    def received_matched(self) -> int:
        """The same, had ranks been renamed after what stood."""
        return sum(one.received_matched for one in self.rebalances)

    @property
    def received_share(self) -> float:
        """Experts received per rebalance, as a fraction of all slots."""
        slots = self.rank_load.shape[0] * self.configuration.topology.num_slots
        return self.received / (len(self.rebalances) * slots) if self.rebalances else 0.0

    @property
    def bytes(self) -> int:
        """That travelled over all rebalances."""
        return sum(one.bytes for one in self.rebalances)

    @property
    def lost_s(self) -> float:
        """Seconds that serving stopped over all rebalances."""
        return sum(one.lost_s for one in self.rebalances)

    @property
    def compute_s(self) -> float:
        """Seconds of all steps."""
        return float(self.step_s.sum())

    def _plans(self) -> tuple[Rebalance, ...]:
        return (self.start, *self.rebalances) if self.start else ()


def play(
    trace: LoadTrace,
    configuration: Configuration,
    setting: Setting,
    on_steps: Callable[[int], None] | None = None,
) -> Outcome:
    """Play a trace.

    The first plan is made from nothing out of the warm-up. Each later one starts from the
    placement in force, sees the load of the steps before it, and is judged on those after it.

    Args:
        trace: [N, L, E].
        configuration: who plans, when, on which slots.
        setting: costs and warm-up.
        on_steps: told how many more steps have been played.
    Collective: none.
    Raises: TraceError if the trace has no steps left after the warm-up; ConfigError for options
        that cannot be; PlacementError if experts do not fit the slots.
    """
    _check(trace, configuration, setting)
    player = _Player(trace, configuration, setting)
    for begin, end in player.spans():
        player.play(begin, end)
        if on_steps:
            on_steps(end - begin)
    return player.outcome()


class _Player:
    """The placement in force, and what has been seen of its steps."""

    def __init__(self, trace: LoadTrace, configuration: Configuration, setting: Setting) -> None:
        self._trace, self._configuration, self._setting = trace, configuration, setting
        topology, judged = configuration.topology, trace.num_steps - setting.warm_up_steps
        self._policy: PlacementPolicy | None = None
        if configuration.policy != IN_ORDER:
            self._policy = make_policy(
                configuration.policy,
                setting.num_groups,
                FlowChoices(move_budget=configuration.move_budget),
            )
        self._placement = place_in_order(trace.num_layers, trace.num_experts, topology)
        self._plans: list[Rebalance] = []
        self._mean = np.zeros((judged, trace.num_layers))
        self._most = np.zeros((judged, trace.num_layers))
        self._rank_load = np.zeros((trace.num_layers, topology.num_ranks))

    def spans(self) -> Iterator[tuple[int, int]]:
        """Steps between plans."""
        first, last = self._setting.warm_up_steps, self._trace.num_steps
        interval = self._configuration.interval_steps or last
        for begin in range(first, last, interval):
            yield begin, min(begin + interval, last)

    def play(self, begin: int, end: int) -> None:
        """Plan before step `begin`, and serve until `end`."""
        steps = self._trace.counts[begin:end]
        following = np.asarray(steps.sum(axis=0), dtype=np.int64)
        if self._policy is not None:
            self._plans.append(self._rebalance(self._policy, begin, end - begin, following))
        num_layers, num_slots = self._placement.slot_to_expert.shape
        chunk = max(1, CHUNK_ENTRIES // (num_layers * num_slots))
        for at in range(0, len(steps), chunk):
            rank_load = spread_load(steps[at : at + chunk], self._placement)
            first = begin + at - self._setting.warm_up_steps
            rows = slice(first, first + len(rank_load))
            self._mean[rows] = rank_load.mean(axis=2)
            self._most[rows] = rank_load.max(axis=2)
            self._rank_load += rank_load.sum(axis=0)

    def outcome(self) -> Outcome:
        """All that was seen."""
        return Outcome(
            self._configuration,
            self._plans[0] if self._plans else None,
            tuple(self._plans[1:]),
            self._mean,
            self._most,
            self._rank_load,
            self._setting.cost.step_s(self._most),
        )

    def _rebalance(
        self, policy: PlacementPolicy, step: int, num_steps: int, following: IntArray
    ) -> Rebalance:
        cost, old = self._setting.cost, self._placement
        load = self._window(step)
        standing = old if self._plans else None
        new = policy.place(load, self._configuration.topology, standing=standing)
        plan = make_plan(old, new)
        self._placement = new
        within_nodes = self._setting.num_groups > 1 and new.topology.num_nodes > 1
        return Rebalance(
            step=step,
            num_steps=num_steps,
            received=plan.num_moves,
            received_matched=count_matched(old, new, within_nodes=within_nodes),
            bytes=plan.num_moves * cost.expert_bytes,
            lost_s=cost.stall_s + cost.transfer_s(plan),
            planned=_balance(load, new),
            following=_balance(following, new),
        )

    def _window(self, step: int) -> IntArray:
        """[L, E] int64, the load that a plan before `step` may see."""
        since = self._configuration.interval_steps or self._setting.warm_up_steps
        first = max(0, step - (self._setting.window_steps or since))
        return np.asarray(self._trace.counts[first:step].sum(axis=0), dtype=np.int64)


def _balance(load: IntArray, placement: Placement) -> float:
    return float(measure_balancedness(spread_load(load, placement)).mean())


def _check(trace: LoadTrace, configuration: Configuration, setting: Setting) -> None:
    for name, value in (
        ("interval_steps", configuration.interval_steps),
        ("window_steps", setting.window_steps),
        ("warm_up_steps", setting.warm_up_steps),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    if trace.num_steps <= setting.warm_up_steps:
        what = "sums, each played as a step," if trace.is_sum else "steps"
        raise TraceError(
            f"{trace.num_steps} {what} leave none to judge after a warm-up of "
            f"{setting.warm_up_steps}: give a longer trace, or several sums; of one sum, "
            "`equipoise plan` makes a placement"
        )
    if not trace.counts[setting.warm_up_steps :].any():
        raise TraceError("no tokens at all after the warm-up")
