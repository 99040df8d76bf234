"""What `equipoise bench dispatch` sends, and what is said of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from equipoise.bench.option_checks import check_least, check_positive
from equipoise.errors import ConfigError

Backend = Literal["torch", "nixl_ep", "nixl_ep, FP8"]
Peer = Literal["transformers' all_to_all", "bare kernels"]


@dataclass(frozen=True)
class DispatchCase:
    """One layer's tokens.

    Attributes:
        backend: what sends them.
        num_tokens: T, of each rank.
        hidden_size: D, of bfloat16.
        top_k: K.
        num_experts: E, one slot each.
        num_repeats: dispatches and combines in a row that are timed together.
        captured: whether both sides are replayed as CUDA graphs.
    """

    backend: Backend
    num_tokens: int
    hidden_size: int
    top_k: int
    num_experts: int
    num_repeats: int
    captured: bool = False

    @property
    def peer(self) -> Peer:
        """What it is compared with."""
        return "transformers' all_to_all" if self.backend == "torch" else "bare kernels"

    @property
    def name(self) -> str:
        """As it is shown."""
        tokens = f"{self.num_tokens} x {self.hidden_size}"
        how = ", in a graph" if self.captured else ""
        return f"{tokens}, top-{self.top_k} of {self.num_experts}{how}"


@dataclass(frozen=True)
class DispatchSpec:
    """What is measured; the same on every rank.

    Attributes:
        cases: in order.
        num_rounds: how often each side of a case is timed, in turns.
        num_ranks: R.
        seed: of tokens and routes.
        timeout_s: longest wait for another rank.
    """

    cases: tuple[DispatchCase, ...]
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
        check_positive(("--timeout", self.timeout_s))
        for case in self.cases:
            if case.num_experts % self.num_ranks:
                raise ConfigError(
                    f"{case.num_experts} experts cannot be spread evenly over {self.num_ranks} "
                    "ranks, as transformers does it: take another number of ranks"
                )


@dataclass(frozen=True)
class DispatchMeasured:
    """A case's figures.

    Attributes:
        case: which.
        wire: what the tokens went over.
        seconds: of one dispatch and combine in each round, of the slowest rank.
        peer_seconds: the same of what it is compared with.
    """

    case: DispatchCase
    wire: str
    seconds: tuple[float, ...]
    peer_seconds: tuple[float, ...]


@dataclass(frozen=True)
class DispatchLeftOut:
    """A case that cannot be measured here.

    Attributes:
        case: which.
        reason: why, and what it needs.
    """

    case: DispatchCase
    reason: str


DispatchSaid = DispatchMeasured | DispatchLeftOut


_NIXL_EP: tuple[Backend, ...] = ("nixl_ep", "nixl_ep, FP8")


def make_cases(*, on_gpus: bool) -> tuple[DispatchCase, ...]:
    """The cases that have goals. Collective: none."""
    # The layer is that of Qwen3-30B-A3B.
    few, many = (20, 5) if on_gpus else (5, 1)
    cases = (
        DispatchCase("torch", 128, 2048, 8, 128, few),
        DispatchCase("torch", 4096, 2048, 8, 128, many),
    )
    if not on_gpus:
        return cases
    return (
        *cases,
        *(
            DispatchCase(backend, 128, 7168, 8, 64, 20, captured)
            for backend in _NIXL_EP
            for captured in (False, True)
        ),
    )
