"""What a job says of itself while it runs; display, report and JSON are made of these alone.

Rank 0 emits them in order: while weights are read, if that takes long, a `LoadRecord` now and then;
one `JobRecord`; then a `PhaseRecord` for each of "off", "loss" (on the
initial placement), "on", "loss" (on the placement arrived at) and, if asked for, "check"; at last
one `ResultRecord`. Behind "off" and "on" stand their `StepRecord`s, and behind "on" its
`RebalanceRecord`s, each behind the step after which experts moved; they come in bursts of 16 steps.
Everything is merged over ranks already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from equipoise.placement import Placement
from equipoise.topology import FloatArray, IntArray

Pass = Literal["off", "on"]
"""The same prompts are served twice: with balancing off, and on."""


@dataclass(frozen=True)
class JobRecord:
    """What is about to run.

    Attributes:
        model: directory or name as given.
        device: "cpu" or the GPUs' name.
        dtype: of the weights, like "float32".
        communicator: the wire in use and, where `auto` chose it, why.
        policy: placement policy.
        num_prompts: prompts of all ranks.
        kinds: kinds of text, in the order in which they first occur.
        placement: the initial one; it has ranks, slots, layers and experts.
        num_parameters: of the logical model.
        expert_bytes: bytes of one expert, all its tensors.
    """

    model: str
    device: str
    dtype: str
    communicator: str
    policy: str
    num_prompts: int
    kinds: tuple[str, ...]
    placement: Placement
    num_parameters: int
    expert_bytes: int


@dataclass(frozen=True)
class LoadRecord:
    """How far rank 0 is with reading its weights.

    Attributes:
        bytes_read: so far.
        bytes_due: all that it reads: what every rank has, and its own experts.
    """

    bytes_read: int
    bytes_due: int


@dataclass(frozen=True)
class PhaseRecord:
    """The job enters a phase: "off" and "on" serve, "loss" scores, "check" compares."""

    phase: Literal["off", "on", "loss", "check"]


@dataclass(frozen=True)
class StepRecord:
    """One forward pass on all ranks; passes in which no rank had a token are left out.

    Attributes:
        in_pass: which pass.
        step: counted from 1 within the pass.
        kind: kind of text in flight, on every rank that has any; None where kinds mix.
        num_tokens: tokens of all ranks that went through the model; padding is not counted.
        num_new_tokens: tokens that were generated.
        logical_count: [L, E] int64, tokens per expert.
        slot_count: [L, P] int64, tokens per slot, as they were really sent.
        placement: the one that it ran on.
        expert_cpu_s: [R] float64, thread CPU seconds that each rank's experts took; 0 on GPUs.
        step_s: wall seconds of the slowest rank's step, balancing included.
    """

    in_pass: Pass
    step: int
    kind: str | None
    num_tokens: int
    num_new_tokens: int
    logical_count: IntArray
    slot_count: IntArray
    placement: Placement
    expert_cpu_s: FloatArray
    step_s: float


@dataclass(frozen=True)
class RebalanceRecord:
    """Experts were moved, after the step named.

    Attributes:
        planned_step: step of the pass "on" whose window it was planned from.
        step: step after which the last slots and maps switched.
        moves: experts received by a rank from another, over all layers and ranks.
        local_moves: slots filled from another slot, or a fan-out copy, of their own rank.
        moves_per_layer: [L] int64, `moves` by layer.
        bytes: bytes that travelled between ranks.
        plan_s: seconds for reducing the load and planning, slowest rank.
        transfer_s: seconds for moving and committing, slowest rank.
        forward_s: seconds that it took of rank 0's forward thread, in the balancer's steps.
        balancedness_before: [L] float64, standing placement on the window's load.
        balancedness_after: [L] float64, new placement on the same load.
        placement: the new one.
    """

    planned_step: int
    step: int
    moves: int
    local_moves: int
    moves_per_layer: IntArray
    bytes: int
    plan_s: float
    transfer_s: float
    forward_s: float
    balancedness_before: FloatArray
    balancedness_after: FloatArray
    placement: Placement


@dataclass(frozen=True)
class Divergence:
    """The first token that differs from the plain model's.

    Attributes:
        prompt: index of the prompt.
        position: index of the generated token.
        expected: the plain model's token.
        got: ours.
        margin: the plain model's logit of its token less that of its runner-up.
    """

    prompt: int
    position: int
    expected: int
    got: int
    margin: float


@dataclass(frozen=True)
class CheckRecord:
    """Our tokens against the plain model's, in one process.

    Attributes:
        num_tokens: generated tokens compared (both passes count).
        num_identical: those that are equal, up to each prompt's first difference.
        max_logit_diff: largest absolute difference of logits, over the positions compared.
        divergence: the first difference, None if there is none.
    """

    num_tokens: int
    num_identical: int
    max_logit_diff: float
    divergence: Divergence | None

    @property
    def outputs_identical(self) -> bool:
        """Whether every token is equal."""
        return self.num_identical == self.num_tokens


@dataclass(frozen=True)
class LossRecord:
    """Held-out loss of one kind of text, in nats per token.

    Attributes:
        kind: of text.
        num_tokens: tokens scored.
        off: on the initial placement.
        on: on the placement that balancing arrived at.
        plain: of the plain model in one process; None without the check.
    """

    kind: str
    num_tokens: int
    off: float
    on: float
    plain: float | None


@dataclass(frozen=True)
class ResultRecord:
    """How it ended.

    Attributes:
        check: None where it was not asked for.
        losses: one per kind that has held-out text.
        seconds: wall seconds of each pass, "off" and "on".
        samples: per kind of prompt its name, the first prompt and its continuation.
    """

    check: CheckRecord | None
    losses: tuple[LossRecord, ...]
    seconds: dict[Pass, float]
    samples: tuple[tuple[str, str, str], ...]


Record = LoadRecord | JobRecord | PhaseRecord | StepRecord | RebalanceRecord | ResultRecord
Emit = Callable[[Record], None]
