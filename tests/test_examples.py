"""The examples of the library run as they stand, with real ranks, and stay short."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NUMBER = r"(\d\.\d+(?:e[+-]\d+)?)"


def run(name: str) -> str:
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) <= 60
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_own_engine() -> None:
    told = re.findall(
        rf"rank (\d): (\d+) experts moved, balancedness {NUMBER} -> {NUMBER}, "
        rf"largest change of an output {NUMBER}",
        run("own_engine"),
    )
    assert sorted(rank for rank, *_ in told) == ["0", "1"]
    for _, moves, before, after, change in told:
        assert int(moves) > 0
        assert float(after) > float(before) + 0.1
        assert float(change) < 1e-5


def test_hugging_face() -> None:
    pytest.importorskip("transformers")
    output = run("hugging_face")
    rebalances = re.findall(
        rf"step (\d): (\d+) experts moved, balancedness {NUMBER} -> {NUMBER}", output
    )
    assert [step for step, *_ in rebalances] == ["2", "4"]
    _, moves, before, after = rebalances[0]
    assert int(moves) > 0
    assert float(after) > float(before)
    differences = re.findall(rf"rank (\d): logits differ by {NUMBER} at most", output)
    assert sorted(rank for rank, _ in differences) == ["0", "1"]
    assert max(float(difference) for _, difference in differences) < 1e-4
