"""Schedules of faults, each made from its seed, over a service whose ranks come, go and balance.

`EQUIPOISE_SCHEDULES=2000 pytest tests/faults/test_random_faults.py -s` runs so many over each wire,
and with `EQUIPOISE_SCHEDULES_MINUTES=45` as many as are done by then; `-k nixl` or `-k gloo` in two
terminals run side by side. A schedule that fails names its seed, another service takes the place of
its own, and `EQUIPOISE_SCHEDULES=1 EQUIPOISE_SEED=...` runs it again.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.faults.schedules import Schedule, draw_schedule
from tests.faults.small_service import SILENCE_S
from tests.faults.storm import Storm, open_storm

FEW = (26, 35)
"""Seeds that are run where none are asked for: between two ranks, six kinds of deeds."""
MINUTES = float(os.environ.get("EQUIPOISE_SCHEDULES_MINUTES", "0"))
IS_ASKED = MINUTES > 0 or "EQUIPOISE_SCHEDULES" in os.environ
NUM_SCHEDULES = int(os.environ.get("EQUIPOISE_SCHEDULES", 100_000)) if IS_ASKED else len(FEW)
FIRST_SEED = int(os.environ.get("EQUIPOISE_SEED", "1"))
WIRES = ["nixl", "torch_gloo"] if IS_ASKED else ["nixl"]
NUM_AHEAD = 24
"""Schedules of which the next is chosen: one for as many ranks as serve already."""
SHORT_SILENCE_S = 2.0
"""After which a rank is given up where many schedules are asked for; these machines are quiet."""
LONGEST_S = 60 * MINUTES + 400 if MINUTES else 400 + 60 * NUM_SCHEDULES


@pytest.mark.timeout(LONGEST_S)
@pytest.mark.parametrize("communicator", WIRES)
def test_nothing_is_lost_whatever_befalls_the_ranks(tmp_path: Path, communicator: str) -> None:
    batch = Batch(communicator, draw_all())
    while batch.has_more:
        directory = tmp_path / str(len(batch.failed))
        directory.mkdir()
        batch.run_over_one_service(directory)
    print(batch.sum_up(), flush=True)
    assert not batch.failed, "\n".join(batch.failed)


def draw_all() -> Iterable[Schedule]:
    seeds = range(FIRST_SEED, FIRST_SEED + NUM_SCHEDULES) if IS_ASKED else FEW
    silence_s = SHORT_SILENCE_S if IS_ASKED else SILENCE_S
    return (draw_schedule(seed, silence_s) for seed in seeds)


class Batch:
    """Schedules over one wire, and what came of them.

    Args:
        communicator: the wire.
        schedules: in the order of their seeds.

    Attributes:
        failed: what each schedule that failed says.
    """

    def __init__(self, communicator: str, schedules: Iterable[Schedule]) -> None:
        self.failed: list[str] = []
        self._communicator, self._schedules = communicator, iter(schedules)
        self._ahead = list(itertools.islice(self._schedules, NUM_AHEAD))
        self._counts: Counter[str] = Counter()
        self._started = time.monotonic()

    @property
    def has_more(self) -> bool:
        """Whether a schedule is left, and time for it."""
        is_late = MINUTES > 0 and self._run_s > 60 * MINUTES
        return bool(self._ahead) and not is_late

    def run_over_one_service(self, directory: Path) -> None:
        """Until nothing is left, or one fails, which leaves nothing that can be relied on."""
        silence_s = SHORT_SILENCE_S if IS_ASKED else SILENCE_S
        first = schedule = self._ahead[0]
        try:
            with open_storm(
                directory, self._communicator, num_ranks=first.num_ranks, silence_s=silence_s
            ) as storm:
                try:
                    while self.has_more:
                        schedule = self._take(storm.count_serving())
                        storm.run(schedule)
                        self._counts["schedules"] += 1
                        if self._counts["schedules"] % 10 == 0:
                            print(self.sum_up(storm), flush=True)
                finally:
                    self._counts += count(storm)
        except Exception as error:
            self.failed.append(
                f"{schedule}\n{error!r}\nto see it again: EQUIPOISE_SEED={schedule.seed} "
                f"EQUIPOISE_SCHEDULES=1 pytest {Path(__file__).name} -k {self._communicator}"
            )
            print(self.failed[-1], flush=True)

    def sum_up(self, storm: Storm | None = None) -> str:
        """How far it is, on one line."""
        counts = self._counts + (count(storm) if storm is not None else Counter())
        rate = 60 * counts["schedules"] / self._run_s
        told = ", ".join(f"{number} {what}" for what, number in counts.most_common())
        return f"{self._communicator}, {self._run_s:.0f} s, {rate:.1f} a minute: {told}"

    @property
    def _run_s(self) -> float:
        return time.monotonic() - self._started

    def _take(self, num_serving: int) -> Schedule:
        """One for which as few ranks as may be come or go first."""
        chosen = min(self._ahead, key=lambda one: abs(one.num_ranks - num_serving))
        self._ahead.remove(chosen)
        self._ahead += itertools.islice(self._schedules, 1)
        return chosen


def count(storm: Storm) -> Counter[str]:
    """What was done to a service, and what it did."""
    totals = storm.controller.status().totals
    return Counter(
        {f"times {deed}": number for deed, number in storm.counts.items()}
        | {
            "requests right": storm.stream.num_right,
            "not": len(storm.stream.faults),
            "run again": totals.rerun,
            "deaths": totals.deaths,
            "recoveries": totals.recoveries,
            "scalings": totals.scalings,
            "rebalances": totals.rebalances,
        }
    )
