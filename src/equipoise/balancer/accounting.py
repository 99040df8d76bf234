"""What is measured beside rebalances: how balanced steps were, and what a rebalance has brought."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from equipoise.balancer.model_state import EplbModelState
from equipoise.balancer.outcome import RebalanceOutcome
from equipoise.config import EPLBConfig
from equipoise.placement import Placement, measure_balancedness, spread_load
from equipoise.topology import IntArray

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Measure:
    """A load that is to be summed over ranks, and what it is to tell.

    Attributes:
        step: up to which it was counted.
        model: whose.
        load: [L, E] int64, tokens of this rank; a copy.
        placement: that it was served from.
        outcome: of the rebalance whose effect it shows; None for the balancedness log.
    """

    step: int
    model: str
    load: Tensor
    placement: Placement
    outcome: RebalanceOutcome | None

    def tell(self, total: IntArray, *, says: bool) -> RebalanceOutcome | None:
        """What the load of all ranks shows.

        Args:
            total: [L, E] int64.
            says: whether this rank logs it.
        Returns:
            The outcome with its realised balancedness; None for the log, or without any load.
        Collective: none.
        """
        if not total.any():
            return None
        per_layer = measure_balancedness(spread_load(total, self.placement))
        if self.outcome is None:
            if says:
                logger.info(
                    "step %d, %s: balancedness %.3f (worst layer %.3f)",
                    self.step,
                    self.model,
                    per_layer.mean(),
                    per_layer.min(),
                )
            return None
        done = replace(self.outcome, balancedness_realised=per_layer)
        if says:
            logger.info("%s", done)
        return done


class Accounts:
    """Counts what measures are made of. Owner: the forward thread; all ranks measure alike.

    Args:
        config: balancing.
    """

    def __init__(self, config: EPLBConfig) -> None:
        self._config = config
        self._since_log: dict[str, Tensor] = {}
        # Of models whose last rebalance was not measured yet: its outcome, the load since, if any
        # step has ended.
        self._since_commit: dict[str, tuple[RebalanceOutcome, Tensor | None]] = {}

    def record(self, models: Iterable[EplbModelState]) -> None:
        """Count the step that the models' windows took last. Collective: none; no host sync."""
        for model in models:
            if self._config.log_balancedness:
                self._since_log[model.name] = _add(self._since_log.get(model.name), model)
            if model.name in self._since_commit:
                outcome, load = self._since_commit[model.name]
                self._since_commit[model.name] = (outcome, _add(load, model))

    def open(self, model: EplbModelState, outcome: RebalanceOutcome) -> None:
        """A rebalance has ended: what comes from here on shows what it has brought."""
        self._since_commit[model.name] = (outcome, None)

    def collect(
        self, models: Iterable[EplbModelState], step: int, *, begins: bool
    ) -> tuple[Measure, ...]:
        """What is to be measured at this step.

        A rebalance's effect is measured once, over as many steps as plans are made from, or up to
        the next rebalance.

        Args:
            models: under balance.
            step: the count.
            begins: whether the next rebalance begins now.
        Collective: none; the same models and purposes on every rank at the same step.
        """
        measures = []
        for model in models:
            is_logged = step % self._config.log_balancedness_interval == 0
            if is_logged and model.name in self._since_log:
                load = self._since_log.pop(model.name)
                measures.append(Measure(step, model.name, load, model.placement, None))
            if model.name in self._since_commit:
                outcome, since = self._since_commit[model.name]
                if begins or step >= outcome.step + self._config.window_size:
                    del self._since_commit[model.name]
                    if since is not None:
                        measures.append(Measure(step, model.name, since, model.placement, outcome))
        return tuple(measures)


def _add(load: Tensor | None, model: EplbModelState) -> Tensor:
    """[L, E] int64, with the step that the model's window took last; changed in place."""
    if load is not None:
        return load.add_(model.window.newest())
    # To be added to at steps in and out of inference mode.
    with torch.inference_mode(False):
        return model.window.newest().clone()


def sum_measures(
    measures: Sequence[Measure], all_reduce: Callable[[Tensor], None], *, says: bool
) -> list[RebalanceOutcome]:
    """Sum loads over ranks, in one exchange, and tell what they show.

    Args:
        measures: the same models and purposes on every rank.
        all_reduce: sums a tensor [n] int64 over all ranks, in place.
        says: whether this rank logs it.
    Returns:
        outcomes that are complete now.
    Collective: every rank.
    """
    if not measures:
        return []
    total = torch.cat([measure.load.flatten().cpu() for measure in measures])
    all_reduce(total)
    sizes = [measure.load.numel() for measure in measures]
    told = [
        measure.tell(np.asarray(part.view(measure.load.shape).numpy()), says=says)
        for measure, part in zip(measures, total.split_with_sizes(sizes), strict=True)
    ]
    return [outcome for outcome in told if outcome is not None]
