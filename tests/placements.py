"""Random placements for property tests: replicas, empty slots, several nodes."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from equipoise.placement import EMPTY, Placement
from equipoise.topology import Topology


def make_random_placement(
    rng: np.random.Generator,
    num_layers: int,
    num_experts: int,
    topology: Topology,
    *,
    empty_share: float = 0.0,
) -> Placement:
    """Every expert once, the other slots at random, of which a share is empty."""
    spare = topology.num_slots - num_experts
    table = np.empty((num_layers, topology.num_slots), dtype=np.int64)
    for row in table:
        extra = rng.integers(0, num_experts, spare)
        extra[rng.random(spare) < empty_share] = EMPTY
        row[:] = rng.permutation(np.concatenate([np.arange(num_experts), extra]))
    return Placement(table, num_experts, topology)


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    num_nodes = draw(st.integers(1, 3))
    return Topology(num_nodes * draw(st.integers(1, 3)), draw(st.integers(1, 4)), num_nodes)


@st.composite
def placement_pairs(draw: st.DrawFn) -> tuple[Placement, Placement]:
    """Two placements of one shape."""
    topology = draw(topologies())
    num_experts = draw(st.integers(1, topology.num_slots))
    num_layers = draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    share = draw(st.sampled_from([0.0, 0.3, 1.0]))
    old, new = (
        make_random_placement(rng, num_layers, num_experts, topology, empty_share=share)
        for _ in range(2)
    )
    return old, new
