"""Fingerprints of a few plans, to be compared between processes."""

from __future__ import annotations

import numpy as np

from equipoise.policy.flow import FlowOptions, FlowPolicy
from equipoise.topology import Topology


def fingerprints() -> list[str]:
    random = np.random.default_rng(31)
    prints = []
    for topology, options in (
        (Topology(8, 5), FlowOptions()),
        (Topology(20, 2), FlowOptions(move_budget=0.2)),
        (Topology(8, 5, 4), FlowOptions(num_groups=8, hierarchy="relaxed")),
    ):
        load = random.integers(0, 5000, (4, 32))
        policy = FlowPolicy(options)
        standing = policy.place(load, topology)
        drifted = load * random.integers(8, 12, load.shape)
        planned = policy.place(drifted, topology, standing=standing)
        prints += [standing.fingerprint(), planned.fingerprint()]
    return prints


if __name__ == "__main__":
    print(*fingerprints())
