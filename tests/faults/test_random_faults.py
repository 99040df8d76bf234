"""Schedules of faults, each made from its seed, over a service whose ranks come, go and balance.

`EQUIPOISE_SCHEDULES=2000 pytest tests/faults/test_random_faults.py -s` runs so many over each wire;
a schedule that fails names its seed, and `EQUIPOISE_SCHEDULES=1 EQUIPOISE_SEED=...` runs it again.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.faults.schedules import Schedule, draw_schedule
from tests.faults.small_service import SILENCE_S
from tests.faults.storm import Storm, open_storm

FEW = 2
NUM_SCHEDULES = int(os.environ.get("EQUIPOISE_SCHEDULES", FEW))
FIRST_SEED = int(os.environ.get("EQUIPOISE_SEED", "1"))
WIRES = ["nixl"] if "EQUIPOISE_SCHEDULES" not in os.environ else ["nixl", "torch_gloo"]


@pytest.mark.timeout(200 + 40 * NUM_SCHEDULES)
@pytest.mark.parametrize("communicator", WIRES)
def test_nothing_is_lost_whatever_befalls_the_ranks(tmp_path: Path, communicator: str) -> None:
    started = time.monotonic()
    with open_storm(tmp_path, communicator) as storm:
        for schedule in _draw_all():
            try:
                storm.run(schedule)
            except Exception as error:
                raise AssertionError(
                    f"{schedule}\n{error}\nto see it again: EQUIPOISE_SEED={schedule.seed} "
                    f"EQUIPOISE_SCHEDULES=1 pytest {Path(__file__).name} -k {communicator}"
                ) from error
            if storm.counts["schedules"] % 10 == 0:
                print(_sum_up(storm, started), flush=True)
        print(_sum_up(storm, started))


def _draw_all() -> list[Schedule]:
    """By size within each hundred, as only what a schedule asks for need start ranks."""
    drawn = [draw_schedule(FIRST_SEED + index, SILENCE_S) for index in range(NUM_SCHEDULES)]
    return sorted(drawn, key=lambda one: ((one.seed - FIRST_SEED) // 100, one.num_ranks))


def _sum_up(storm: Storm, started: float) -> str:
    totals = storm.controller.status().totals
    changes = f"{totals.recoveries} recoveries, {totals.scalings} scalings"
    return (
        f"{time.monotonic() - started:.0f} s: {dict(storm.counts)}; {storm.stream.num_right} "
        f"requests right, {len(storm.stream.faults)} not; {totals.deaths} deaths, "
        f"{changes}, {totals.rebalances} rebalances"
    )
