"""What an engine is asked for, and what it answers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from equipoise.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length", "cancelled"]
"""`stop`: an end token or a stop string; `length`: as many tokens as were asked for."""


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen, and where it ends.

    Token i is drawn from (seed, i) alone: a request that is run again elsewhere, from its tokens so
    far, goes on with the same ones.

    Attributes:
        max_new_tokens: at most, counted from the prompt on.
        temperature: 0 takes the likeliest token; the higher, the more even the draw.
        top_p: draw among the likeliest tokens that together have this probability.
        seed: of the draws, 0..2**64-1.
        stop: texts that end the request when they appear in what it generates.
        ignore_end: go on behind tokens that end a text.
    Raises: ConfigError, naming the value, if it is out of range.
    """

    max_new_tokens: int = 32
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_end: bool = False

    def __post_init__(self) -> None:
        for name, is_right, right in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "a number from 0 on"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("seed", 0 <= self.seed < 1 << 64, "from 0 to 2**64 - 1"),
        ):
            if not is_right:
                raise ConfigError(f"{name} must be {right}, got {getattr(self, name)}")
        if "" in self.stop:
            raise ConfigError("a stop string must not be empty")


@dataclass
class Request:
    """A prompt and what has become of it. Owner: the engine that it was submitted to.

    Attributes:
        id: not used by another request of the engine.
        tokens: of the prompt, at least one.
        sampling: how its tokens are chosen.
        generated: so far, a token that ends the text included; not empty at submission where the
            request is run again from its tokens so far.
        kind: index of its kind of text, for figures by kind.
        logits: of tokens generated here, [V] float32 on the CPU, where the engine keeps them.
    """

    id: str
    tokens: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    generated: list[int] = field(default_factory=list)
    kind: int = 0
    logits: list[Tensor] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class Delta:
    """What a step gave a request. Each token is in one of a request's deltas, in order.

    Attributes:
        request_id: whose.
        position: index of the first of `tokens` among the generated ones.
        tokens: new ones; none where only the end is told.
        finish_reason: why the request has ended; None while it goes on.
    """

    request_id: str
    position: int
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None = None
