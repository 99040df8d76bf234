"""What `equipoise bench layer` computes, and what is said of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from equipoise.bench.option_checks import check_least, check_positive
from equipoise.errors import ConfigError

Routing = Literal["uniform", "skewed"]
SideName = Literal["ours", "theirs", "balanced"]


@dataclass(frozen=True)
class LayerSize:
    """One MoE layer.

    Attributes:
        num_experts: E.
        top_k: K.
        hidden_size: D.
        expert_size: I.
        num_redundant: slots besides E, where load is balanced.
        dtype: of weights and hidden states, as torch names it.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    expert_size: int
    num_redundant: int
    dtype: Literal["float32", "bfloat16"]


SMALL = LayerSize(32, 4, 512, 256, 4, "float32")
"""For a CPU."""
QWEN3_30B = LayerSize(128, 8, 2048, 768, 16, "bfloat16")


@dataclass(frozen=True)
class LayerCase:
    """Some tokens.

    Attributes:
        num_tokens: T, of each rank.
        routing: how they choose experts.
        num_repeats: forward passes in a row that are timed together.
    """

    num_tokens: int
    routing: Routing
    num_repeats: int

    @property
    def sides(self) -> tuple[SideName, ...]:
        """What is compared: balancing only where there is something to balance."""
        return ("ours", "theirs") if self.routing == "uniform" else ("ours", "theirs", "balanced")


@dataclass(frozen=True)
class LayerSpec:
    """What is measured; the same on every rank.

    Attributes:
        cases: in order.
        size: of the layer.
        kernels: transformers' implementation that both sides compute with.
        skew: popularity of the n-th expert is 1 / n**skew, where routing is skewed.
        num_rounds: how often each side of a case is timed, in turns.
        num_ranks: R.
        seed: of weights, tokens and routes.
        timeout_s: longest wait for another rank.
    """

    cases: tuple[LayerCase, ...]
    size: LayerSize
    kernels: str = "grouped_mm"
    skew: float = 0.5
    num_rounds: int = 11
    num_ranks: int = 2
    seed: int = 0
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        check_least(
            ("--ranks", self.num_ranks, 2),
            ("--rounds", self.num_rounds, 1),
            *(("--tokens", case.num_tokens, 1) for case in self.cases),
        )
        check_positive(("--timeout", self.timeout_s), ("--skew", self.skew))
        slots = self.size.num_experts, self.size.num_redundant
        if any(number % self.num_ranks for number in slots):
            raise ConfigError(
                f"{slots[0]} experts and {slots[1]} redundant slots cannot be spread evenly over "
                f"{self.num_ranks} ranks: take another number of ranks"
            )


@dataclass(frozen=True)
class LayerMeasured:
    """A case's figures.

    Attributes:
        case: which.
        wire: what the tokens went over.
        seconds: by side, of one forward pass in each round, of the slowest rank.
        imbalance: by side, load of the busiest rank over the mean.
    """

    case: LayerCase
    wire: str
    seconds: dict[SideName, tuple[float, ...]]
    imbalance: dict[SideName, float]


def make_cases(num_tokens: int | None, *, on_gpus: bool) -> tuple[LayerCase, ...]:
    """The cases that are shown, or one number of tokens. Collective: none."""
    counts: tuple[tuple[int, int], ...] = ((128, 20), (4096, 5))
    if not on_gpus:
        counts = ((32, 10), (512, 2))
    if num_tokens is not None:
        counts = ((num_tokens, 1),)
    routings: tuple[Routing, ...] = ("uniform", "skewed")
    return tuple(
        LayerCase(tokens, routing, repeats) for tokens, repeats in counts for routing in routings
    )
