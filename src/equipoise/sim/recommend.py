"""Comparing configurations, and choosing one with a reason."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from equipoise.load.trace import LoadTrace
from equipoise.sim.policies import takes_budget
from equipoise.sim.replay import IN_ORDER, Configuration, Outcome, Setting
from equipoise.topology import Topology

ALIKE = 0.001
"""Net gains that differ by no more are taken for equal: a tenth of a percent of the time."""


@dataclass(frozen=True, eq=False)
class Replay:
    """A trace played against many configurations.

    Attributes:
        trace: what was played.
        setting: costs and warm-up.
        baseline: experts in order, never moved.
        outcomes: one per configuration, in the order asked for.
    """

    trace: LoadTrace
    setting: Setting
    baseline: Outcome
    outcomes: tuple[Outcome, ...]

    def gain(self, outcome: Outcome) -> float:
        """Time of the steps saved against the baseline, as a fraction of the baseline's."""
        return 1.0 - outcome.compute_s / self.baseline.compute_s

    def loss(self, outcome: Outcome) -> float:
        """Time that rebalances took, as a fraction of the baseline's; 0 where steps are sums.

        What time a sum covers is not known, so nothing can be set against it.
        """
        return 0.0 if self.trace.is_sum else outcome.lost_s / self.baseline.compute_s

    def net_gain(self, outcome: Outcome) -> float:
        """`gain` less `loss`."""
        return self.gain(outcome) - self.loss(outcome)

    def choose(self, outcomes: Sequence[Outcome]) -> Outcome:
        """Of those that gain most, the one that moves least, then the one of fewest slots."""
        best = max(map(self.net_gain, outcomes))
        alike = [one for one in outcomes if self.net_gain(one) >= best - ALIKE]
        return min(
            alike,
            key=lambda one: (one.bytes, one.configuration.topology.num_slots, -self.net_gain(one)),
        )

    def recommended(self) -> Outcome | None:
        """What `choose` takes of all; None if it gains nothing."""
        chosen = self.choose(self.outcomes) if self.outcomes else None
        return chosen if chosen is not None and self.net_gain(chosen) > 0.0 else None

    def reason(self) -> str:
        """Why that one, or why none, in a sentence of the replay's own figures."""
        chosen = self.recommended()
        if not self.outcomes:
            return "Nothing was played but experts in order."
        if chosen is None:
            best = max(self.outcomes, key=self.net_gain)
            return f"None pays: the best, {self._account(best)}; leave experts in order."
        text = f"{self._account(chosen)}, net {say_change(self.net_gain(chosen))}"
        others = [one for one in self.outcomes if one is not chosen]
        if not others:
            return f"{text}."
        rival = max(others, key=self.net_gain)
        gain = say_change(self.net_gain(rival))
        name = describe(rival.configuration)
        return f"{text}; next is {name}: {gain} for {rival.received:,} received experts."

    def _account(self, outcome: Outcome) -> str:
        gain, loss = say_share(self.gain(outcome)), say_share(self.loss(outcome))
        return (
            f"{describe(outcome.configuration)}, saves {gain} of the step time and loses {loss} "
            f"to {outcome.received:,} received experts"
        )


def say_share(fraction: float) -> str:
    """A fraction in percent, like `4.2%`, and never `-0.0%`."""
    return f"{round(fraction, 3) + 0.0:.1%}"


def say_change(fraction: float) -> str:
    """The same with its sign, like `+4.2%`."""
    return f"{round(fraction, 3) + 0.0:+.1%}"


def describe(configuration: Configuration) -> str:
    """A configuration in words."""
    topology = configuration.topology
    when = (
        "planned once"
        if configuration.interval_steps is None
        else f"every {configuration.interval_steps} steps"
    )
    if configuration.policy == IN_ORDER:
        when = "never moved"
    slots = f"{topology.num_slots} slots"
    if configuration.move_budget is not None:
        slots = f"at most {configuration.move_budget * 100:.3g}% of {slots} moved"
    return f"{configuration.policy} {when}, {slots}"


def make_configurations(
    policies: Iterable[str],
    intervals: Sequence[int | None],
    topologies: Sequence[Topology],
    budgets: Sequence[float],
) -> tuple[Configuration, ...]:
    """Every combination that makes a difference.

    Args:
        policies: names.
        intervals: steps between plans, None for a single plan.
        topologies: ranks and slots.
        budgets: fractions of slots that a plan may move, for policies that take it; empty for
            their default.
    Collective: none.
    """
    made = (
        Configuration(policy=policy, topology=topology, interval_steps=interval, move_budget=budget)
        for policy, topology, interval in product(policies, topologies, intervals)
        # A plan from nothing has no budget.
        for budget in (budgets if takes_budget(policy) and interval and budgets else [None])
    )
    return tuple(dict.fromkeys(made))
