"""What `bench step` measures, and what ranks say of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from equipoise.bench.step_prediction import TimedExperts
from equipoise.config import EPLBConfig
from equipoise.errors import ConfigError
from equipoise.topology import FloatArray, IntArray

CaseName = Literal["prefill", "decode", "recorder", "stall", "graphs"]
CASES: tuple[CaseName, ...] = ("prefill", "decode", "recorder", "stall", "graphs")
GPU_CASES: tuple[CaseName, ...] = ("recorder", "graphs")
"""Cases that say nothing on a CPU."""
_DISPATCHERS = ("torch", "nixl_ep")
_MOST_BLOCK_STEPS = 100


@dataclass(frozen=True)
class ModelSize:
    """A model of the bundled one's architecture, with random weights.

    Attributes:
        num_layers: L.
        num_experts: E.
        top_k: K.
        hidden_size: D.
        expert_size: I.
        num_heads: of queries.
        num_kv_heads: of keys and values.
        head_dim: of each.
        vocabulary: tokens.
    """

    num_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    expert_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary: int


BUNDLED = ModelSize(4, 32, 4, 128, 48, 4, 2, 32, 384)
SCALED = ModelSize(24, 128, 8, 2048, 768, 32, 4, 128, 4096)


@dataclass(frozen=True)
class StepSpec:
    """What is measured; the same on every rank.

    Attributes:
        size: of the model.
        kind: of text, whose loads the model has.
        device: kind of device.
        num_ranks: R, processes.
        cases: which.
        prefill_tokens: of prompts, per rank and step.
        prompt_len: tokens of each of these prompts.
        decode_size: sequences per rank that decode.
        num_steps: of each kind in a case.
        num_stall_steps: of each kind in the case of rebalances back to back.
        dispatcher: what tokens travel by.
        communicator: what experts travel by.
        balancing: options of the model that is rebalanced back to back; when, and by what wire, are
            the bench's.
        seed: of weights, tokens and routes.
        timeout_s: longest wait for another rank.
    Raises: ConfigError.
    """

    size: ModelSize = BUNDLED
    kind: str = "gpqa_main"
    device: Literal["cpu", "cuda"] = "cpu"
    num_ranks: int = 2
    cases: tuple[CaseName, ...] = CASES
    prefill_tokens: int = 512
    prompt_len: int = 64
    decode_size: int = 16
    num_steps: int = 40
    num_stall_steps: int = 200
    dispatcher: str = "torch"
    communicator: str = "auto"
    balancing: EPLBConfig = field(default_factory=EPLBConfig)
    seed: int = 0
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--ranks", self.num_ranks, 2),
            ("--layers", self.size.num_layers, 1),
            ("--prefill-tokens", self.prefill_tokens, self.prompt_len),
            ("--sequences", self.decode_size, 1),
            ("--steps", self.num_steps, 10),
            ("--stall-steps", self.num_stall_steps, 1),
            ("--seed", self.seed, 0),
        ):
            if value < least:
                raise ConfigError(f"{flag} must be at least {least}, got {value}")
        unknown = set(self.cases) - set(CASES)
        if unknown:
            raise ConfigError(f"--case: there are {', '.join(CASES)}, not {sorted(unknown)[0]!r}")
        if self.dispatcher not in _DISPATCHERS:
            known = ", ".join(_DISPATCHERS)
            raise ConfigError(f"--dispatcher: there are {known}, not {self.dispatcher!r}")

    @property
    def block_steps(self) -> int:
        """Steps with rebalances back to back, or without, before it is the other's turn."""
        return min(_MOST_BLOCK_STEPS, self.num_stall_steps)

    @property
    def num_prompts(self) -> int:
        """Of a step that takes prompts."""
        return self.prefill_tokens // self.prompt_len


@dataclass(frozen=True)
class Timed:
    """Steps of one kind.

    Attributes:
        step_s: [steps] float64, wall seconds of the slowest rank.
        balance_s: [steps] float64, of these in the balancer's step, on the slowest rank.
        num_tokens: of all ranks and steps.
        rank_tokens: [steps, L, R] int64, rows that each rank's experts computed.
        occupied: [steps, L, R] int64, its slots that had any.
    """

    step_s: FloatArray
    balance_s: FloatArray
    num_tokens: int
    rank_tokens: IntArray
    occupied: IntArray


@dataclass(frozen=True)
class StepParts:
    """Seconds of a step by parts, all layers together; mean over steps.

    Attributes:
        dispatch_s: in sending tokens, waits for other ranks included; mean over ranks.
        experts_s: of the experts; of each rank.
        slowest_experts_s: the same on each layer's slowest rank.
        combine_s: in bringing outputs home, waits included; mean over ranks.
        between_s: from one layer's experts to the next one's; mean over ranks.
        experts_scatter_s: by how much one layer's experts differ on one rank from step to step,
            standard deviation, mean over layers and ranks: what ranks wait for on an even load.
        between_scatter_s: the same of what is between two layers' experts.
    """

    dispatch_s: float
    experts_s: tuple[float, ...]
    slowest_experts_s: float
    combine_s: float
    between_s: float
    experts_scatter_s: float
    between_scatter_s: float


@dataclass(frozen=True)
class Compared:
    """One case, with something off and on, in one run.

    Attributes:
        case: which.
        off: without balancing; without what the case is about.
        on: with it.
        experts: what the MoE part takes, where the case predicts something.
        parts: of steps that take prompts, as it came and balanced.
        moves: experts that travelled.
        rebalances: that ended.
    """

    case: CaseName
    off: Timed
    on: Timed
    experts: TimedExperts | None = None
    parts: tuple[StepParts, StepParts] | None = None
    moves: int = 0
    rebalances: int = 0


@dataclass(frozen=True)
class LeftOut:
    """A case that cannot be measured here.

    Attributes:
        case: which.
        reason: what it needs.
    """

    case: CaseName
    reason: str


@dataclass(frozen=True)
class Setting:
    """What was measured on.

    Attributes:
        device: its name.
        dtype: of the weights.
        communicator: the wire, and why.
    """

    device: str
    dtype: str
    communicator: str


StepSaid = Compared | LeftOut | Setting
