"""What the local search is told, and what it tells."""

from __future__ import annotations

from typing import NamedTuple

from equipoise.topology import FloatArray, IntArray

WIDTH = 12
"""Numbers that one change takes at most: slot and expert of up to six slots."""


class Bounds(NamedTuple):
    """What the search keeps to; plain arrays, so that a kernel can take it.

    Attributes:
        slowness: [R] float64, mean rank speed over the rank's.
        node_of_rank: [R] int64.
        home: [L, E] int64, node on which an expert keeps at least one replica; -1 for none.
        least: replicas below which no expert falls by the search.
        most: replicas that no expert exceeds.
        spread: nodes on which every expert keeps replicas, at least; 1 for no such wish.
        leaving: [L] float64, fraction of tokens that may be served off their expert's home.
        by_node: whether home, spread and leaving bind at all.
        goal: [L] float64, busy time of the busiest rank at which a layer is good enough.
        frugal: weigh gains against the experts received, and log.
        max_looks: changes evaluated per layer, about at most.
        max_steps: changes made per layer, at most.
    """

    slowness: FloatArray
    node_of_rank: IntArray
    home: IntArray
    least: int
    most: int
    spread: int
    leaving: FloatArray
    by_node: bool
    goal: FloatArray
    frugal: bool
    max_looks: int
    max_steps: int


class Log(NamedTuple):
    """What the search did, layer by layer, step by step; step 0 is the start.

    Attributes:
        slots: [L, M, 2] int64, the slots that step m changed; -1 for none.
        experts: [L, M, 2] int64, what they hold since.
        received: [L, M] int64, experts that ranks hold after step m and did not at the start.
        peak: [L, M] float64, busy time of the busiest rank after step m.
        num_steps: [L] int64, steps logged, the start included.
    """

    slots: IntArray
    experts: IntArray
    received: IntArray
    peak: FloatArray
    num_steps: IntArray
