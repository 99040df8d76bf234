"""What a step did on this rank.

Axis letters: L layers, P slots.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from equipoise.balancer import RebalanceOutcome
from equipoise.engine.requests import Delta
from equipoise.placement import Placement


@dataclass(frozen=True)
class SetLoad:
    """A set of layers: its placement, and [L, P] int64 of this rank's tokens by slot."""

    placement: Placement
    slot_count: Tensor


@dataclass(frozen=True)
class StepFigures:
    """One step of one rank.

    Attributes:
        num_tokens: this rank's, without padding.
        num_new_tokens: generated.
        kinds: of the requests that it was for.
        expert_cpu_s: CPU seconds of this rank's experts.
        loads: of each set of layers, where the engine keeps them.
        step_s: wall seconds, balancing included.
        balance_s: of these, in the balancer's step: what rebalancing costs this thread.
    """

    num_tokens: int = 0
    num_new_tokens: int = 0
    kinds: frozenset[int] = frozenset()
    expert_cpu_s: float = 0.0
    loads: tuple[SetLoad, ...] = ()
    step_s: float = 0.0
    balance_s: float = 0.0


@dataclass(frozen=True)
class StepResult:
    """What a step or a tick gave this rank's requests, and the rebalances that ended with it."""

    deltas: tuple[Delta, ...]
    figures: StepFigures
    outcomes: tuple[RebalanceOutcome, ...]
