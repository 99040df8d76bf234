"""Shapes and loads that policies are compared on; all from fixed seeds or from a trace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from equipoise.load.trace import LoadTrace
from equipoise.topology import FloatArray, IntArray, Topology

TOKENS = 4_000_000
"""Expert choices per layer and window: 500,000 tokens of top-8."""

LoadKind = Literal["zipf", "lognormal", "dirichlet"]


@dataclass(frozen=True)
class Shape:
    """A deployment.

    Attributes:
        name: as tables call it.
        num_layers: L.
        num_experts: E.
        topology: ranks, nodes and slots.
        num_groups: equal groups of consecutive experts, for hierarchies; 1 where there are none.
    """

    name: str
    num_layers: int
    num_experts: int
    topology: Topology
    num_groups: int = 1

    @property
    def in_pairs(self) -> bool:
        """Whether a rank has two slots."""
        return self.topology.slots_per_rank == 2


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("EP32", 58, 256, Topology(32, 9, 4), 8),
        Shape("Qwen", 94, 128, Topology(16, 9)),
        Shape("EP64", 58, 256, Topology(64, 5)),
        Shape("Kimi", 60, 384, Topology(64, 7)),
        Shape("EP144", 58, 256, Topology(144, 2)),
        Shape("EP256", 61, 256, Topology(256, 2)),
        Shape("R1000", 60, 512, Topology(1000, 2)),
    )
}


def draw_load(kind: LoadKind, shape: Shape, seed: int) -> IntArray:
    """Draw one window's load.

    Args:
        kind: "zipf": exponent 1 in random order; "lognormal": sigma 1; "dirichlet": alpha 0.5.
        shape: layers and experts.
        seed: of the generator.
    Returns:
        [L, E] int64, about `TOKENS` per layer.
    Collective: none.
    """
    random = np.random.default_rng(seed)
    size = (shape.num_layers, shape.num_experts)
    match kind:
        case "zipf":
            weight = random.permuted(np.tile(1.0 / np.arange(1, size[1] + 1), (size[0], 1)), axis=1)
        case "lognormal":
            weight = np.exp(random.normal(size=size))
        case "dirichlet":
            weight = random.dirichlet(np.full(size[1], 0.5), size=size[0])
    return _to_tokens(weight)


def walk_load(shape: Shape, step: float, num_windows: int, seed: int) -> IntArray:
    """Draw a load that drifts: log-loads start normal and take a normal step each window.

    Args:
        shape: layers and experts.
        step: standard deviation of a step.
        num_windows: W.
        seed: of the generator.
    Returns:
        [W, L, E] int64, about `TOKENS` per layer and window.
    Collective: none.
    """
    random = np.random.default_rng(seed)
    moves = random.normal(size=(num_windows, shape.num_layers, shape.num_experts))
    moves[1:] *= step
    return _to_tokens(np.exp(moves.cumsum(axis=0)))


def resample_trace(trace: LoadTrace, shape: Shape, num_windows: int, seed: int) -> IntArray:
    """Stretch a trace to a shape: layers drawn from its layers, experts from their quantiles.

    An expert lies between two of the trace's that are neighbours by load, and its log-load
    follows theirs through the windows, so that both skew and drift are the trace's.

    Args:
        trace: of any layers and experts.
        shape: layers and experts to be had.
        num_windows: W, equal parts of the trace's steps.
        seed: of what is drawn.
    Returns:
        [W, L, E] int64, about `TOKENS` per layer and window.
    Collective: none.
    """
    random = np.random.default_rng(seed)
    parts = np.array_split(np.arange(trace.num_steps), num_windows)
    windows = np.stack([trace.counts[part].sum(axis=0) for part in parts])
    log_load = np.log(windows + 0.5)
    order = np.argsort(windows.sum(axis=0), axis=1, kind="stable")
    layer = random.permuted(np.arange(shape.num_layers) % trace.num_layers)[:, None]
    quantile = random.uniform(0, trace.num_experts - 1, (shape.num_layers, shape.num_experts))
    below = np.minimum(quantile.astype(np.int64), max(trace.num_experts - 2, 0))
    above = np.minimum(below + 1, trace.num_experts - 1)
    low, high = (log_load[:, layer, order[layer, at]] for at in (below, above))
    return _to_tokens(np.exp(low + (quantile - below) * (high - low)))


def _to_tokens(weight: FloatArray) -> IntArray:
    share = weight / weight.sum(axis=-1, keepdims=True)
    return np.asarray(np.round(share * TOKENS), dtype=np.int64)
