"""Rebalance after rebalance over every wire of the CPU: no wrong byte, and nothing grows.

In the tests a few; `REBALANCES=1000 .venv/bin/pytest tests/test_rebalances.py` for more.
"""

from __future__ import annotations

import os

import pytest

from tests.ranks import Rank, processes
from tests.rebalances import move_about

NUM_REBALANCES = int(os.environ.get("REBALANCES", "40"))


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("wire", ["torch_gloo", "nixl"])
@processes(3, timeout_s=1180)
def test_every_slot_holds_what_the_map_says(rank: Rank, wire: str) -> None:
    group = rank.make_group()
    move_about(group, wire, NUM_REBALANCES)
    group.barrier()
    group.close()
