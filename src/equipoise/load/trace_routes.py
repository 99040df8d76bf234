"""Steps out of the routes of single tokens: sequences are served side by side, as an engine does.

A sequence takes one of the places in flight, adds a few tokens to every step until it is over,
and gives its place to the next.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from equipoise.errors import ConfigError, TraceError
from equipoise.topology import IntArray

CHUNK_ENTRIES = 4_000_000
"""Assignments counted at once: flat indices take 8 bytes each."""
MAX_COUNTS_BYTES = 8 * 2**30
"""More than what the counts of all steps may take in memory."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How sequences are taken to have been served.

    Attributes:
        num_in_flight: sequences served side by side.
        tokens_per_step: tokens that each of them adds to a step; 1 is decoding.
        order: "by-domain": one domain after another, so that the load drifts (as in the file
            where no domains are known); "interleaved": domains mixed evenly.
    Raises: ConfigError if one cannot be, naming it.
    """

    num_in_flight: int = 64
    tokens_per_step: int = 1
    order: Literal["by-domain", "interleaved"] = "by-domain"

    def __post_init__(self) -> None:
        for name in ("num_in_flight", "tokens_per_step"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.order not in ("by-domain", "interleaved"):
            raise ConfigError(f"order is by-domain or interleaved, got {self.order!r}")


@dataclass(frozen=True, eq=False)
class Routes:
    """Which experts each token was sent to.

    Attributes:
        experts: [T, L, K] of any integer type; -1 where a token took fewer than K.
        seq_offsets: [Q + 1] int64, where each sequence begins; from 0 to T.
        domains: what each sequence is about, Q words, or empty where that is not known.
    Raises: TraceError if they do not fit together, naming the field.
    """

    experts: npt.NDArray[Any]
    seq_offsets: IntArray
    domains: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        experts, offsets = self.experts, self.seq_offsets
        if experts.ndim != 3 or experts.size == 0 or experts.dtype.kind not in "iu":
            raise TraceError(
                "experts must be [tokens, layers, top-k] whole numbers, got "
                f"{list(experts.shape)} {experts.dtype}"
            )
        if offsets.ndim != 1 or offsets.size < 2 or offsets.dtype.kind not in "iu":
            raise TraceError(
                "seq_offsets must be [sequences + 1] whole numbers, got "
                f"{list(offsets.shape)} {offsets.dtype}"
            )
        offsets = offsets.astype(np.int64)
        object.__setattr__(self, "seq_offsets", offsets)
        rising = bool((self.lengths >= 0).all())
        if offsets[0] != 0 or offsets[-1] != len(experts) or not rising:
            raise TraceError(
                f"seq_offsets must rise from 0 to the {len(experts)} tokens of experts, got "
                f"{offsets[0]} to {offsets[-1]}{'' if rising else ', not rising'}"
            )
        if self.domains and len(self.domains) != offsets.size - 1:
            raise TraceError(
                f"domains has {len(self.domains)} entries for {offsets.size - 1} sequences"
            )

    @property
    def lengths(self) -> IntArray:
        """[Q] int64, tokens of each sequence."""
        return self.seq_offsets[1:] - self.seq_offsets[:-1]


def steps_from_routes(
    routes: Routes, num_experts: int | None, serving: Serving
) -> tuple[IntArray, tuple[str, ...]]:
    """Count the tokens of each expert, step by step.

    Args:
        routes: of T tokens in sequences.
        num_experts: E; None for the highest expert that occurs, and those before it.
        serving: which tokens share a step.
    Returns:
        counts [N, L, E] int64, and the domain of most tokens of each step, N words or none.
    Collective: none.
    Raises: TraceError if an expert is beyond E or below -1, or if there are more steps than fit
        in memory; ConfigError if domains shall be interleaved that are not known.
    """
    highest, lowest = int(routes.experts.max()), int(routes.experts.min())
    most = highest + 1 if num_experts is None else num_experts
    if highest >= most or lowest < -1:
        token, layer, _ = np.argwhere((routes.experts >= most) | (routes.experts < -1))[0]
        raise TraceError(
            f"experts: token {token}, layer {layer} went to expert "
            f"{highest if highest >= most else lowest}: experts are 0 to {most - 1}, and -1 is none"
        )
    step_of_token = _schedule(routes, serving)
    num_steps, num_layers = int(step_of_token.max()) + 1, routes.experts.shape[1]
    if num_steps * num_layers * most * 8 > MAX_COUNTS_BYTES:
        raise TraceError(
            f"experts: {num_steps} steps of {num_layers} x {most} counts need more than "
            f"{MAX_COUNTS_BYTES >> 30} GiB: take more sequences in flight or tokens per step"
        )
    counts = _count(routes.experts, step_of_token, num_steps, most)
    return counts, _name_steps(routes, step_of_token, num_steps)


def _count(
    experts: npt.NDArray[Any], step_of_token: IntArray, num_steps: int, num_experts: int
) -> IntArray:
    num_tokens, num_layers, top_k = experts.shape
    width = num_layers * num_experts
    counts = np.zeros(num_steps * width, dtype=np.int64)
    # By step, so that a chunk touches few of them.
    order = np.argsort(step_of_token, kind="stable")
    base = (np.arange(num_layers) * num_experts)[:, None]
    chunk = max(1, CHUNK_ENTRIES // (num_layers * top_k))
    for start in range(0, num_tokens, chunk):
        tokens = order[start : start + chunk]
        steps = step_of_token[tokens]
        first, last = int(steps[0]), int(steps[-1])
        chosen = experts[tokens].astype(np.int64)
        flat = chosen + base + ((steps - first) * width)[:, None, None]
        flat = flat[chosen >= 0] if chosen.min() < 0 else flat.reshape(-1)
        span = slice(first * width, (last + 1) * width)
        counts[span] += np.bincount(flat, minlength=(last + 1 - first) * width)
    return counts.reshape(num_steps, num_layers, num_experts)


def _schedule(routes: Routes, serving: Serving) -> IntArray:
    """[T] int64, the step in which each token is served."""
    lengths = routes.lengths
    num_steps = -(-lengths // serving.tokens_per_step)
    begins = np.zeros(len(lengths), dtype=np.int64)
    free_at = [0] * serving.num_in_flight
    for sequence in _order(routes.domains, len(lengths), serving.order):
        begins[sequence] = free_at[0]
        heapq.heapreplace(free_at, free_at[0] + int(num_steps[sequence]))
    position = np.arange(len(routes.experts)) - np.repeat(routes.seq_offsets[:-1], lengths)
    steps: IntArray = np.repeat(begins, lengths) + position // serving.tokens_per_step
    return steps


def _order(domains: tuple[str, ...], num_sequences: int, order: str) -> list[int]:
    """Sequences in the order in which they are taken into service."""
    if order == "by-domain":
        return sorted(range(num_sequences), key=lambda at: domains[at] if domains else "")
    if not domains:
        raise ConfigError("order interleaved needs the domain of each sequence, which is not known")
    names, domain = np.unique(np.array(domains), return_inverse=True)
    sizes = np.bincount(domain, minlength=len(names))
    ordinal = np.zeros(num_sequences)
    for name in range(len(names)):
        ordinal[domain == name] = np.arange(sizes[name])
    share = (ordinal + 0.5) / sizes[domain]
    return [int(at) for at in np.lexsort((domain, share))]


def _name_steps(routes: Routes, step_of_token: IntArray, num_steps: int) -> tuple[str, ...]:
    if not routes.domains:
        return ()
    names, domain = np.unique(np.array(routes.domains), return_inverse=True)
    of_token = np.repeat(domain, routes.lengths)
    tokens = np.bincount(
        step_of_token * len(names) + of_token, minlength=num_steps * len(names)
    ).reshape(num_steps, -1)
    return tuple(str(names[at]) for at in tokens.argmax(axis=1))
