"""A process that balances in the background ends when its main thread does, wherever that is."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.exiting_rank import LONGEST_S, NUM_RANKS, STATES

# One rank waits for the other, whose worker hangs.
USUAL = "at an exchange"


@pytest.mark.slow
@pytest.mark.timeout(4 * LONGEST_S)
@pytest.mark.parametrize(
    "state",
    [one if one == USUAL else pytest.param(one, marks=pytest.mark.more_faults) for one in STATES],
)
def test_a_process_ends_wherever_its_worker_is(state: str, tmp_path: Path) -> None:
    with ExitStack() as running:
        ranks = [
            running.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.exiting_rank", state, str(rank), str(tmp_path)],
                    cwd=Path(__file__).parents[1],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for rank in range(NUM_RANKS)
        ]
        for process in ranks:
            running.callback(process.kill)
        for rank, process in enumerate(ranks):
            told, complained = process.communicate(timeout=3 * LONGEST_S)
            assert (process.returncode, told) == (0, f"rank {rank} is {state}\n"), complained
            assert state == "failed" or complained == ""
