"""What a step did on this rank, in figures.

Axis letters: L layers, P slots.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from equipoise.placement import Placement

NO_KIND = -1
"""Kind of a step in which a rank, or every rank, has nothing running."""
MIXED = -2
"""Kind of a step in which several kinds of text are running."""


@dataclass(frozen=True)
class StepFigures:
    """One step of one rank.

    Attributes:
        placement: the one that the step ran on.
        slot_count: [L, P] int64 on the device, this rank's tokens by the slot they were sent to.
        num_tokens: this rank's, without padding.
        num_new_tokens: generated.
        kind: index of the kind of text that runs, NO_KIND or MIXED.
        expert_cpu_s: CPU seconds of this rank's experts.
        step_s: wall seconds, balancing included.
    """

    placement: Placement
    slot_count: Tensor
    num_tokens: int
    num_new_tokens: int
    kind: int
    expert_cpu_s: float
    step_s: float
