"""`equipoise bench stall`: a small case through real ranks, and what it refuses."""

from __future__ import annotations

import json

import pytest

from tests.command_line import run_command


def test_a_small_case_tells_step_times_and_that_nothing_was_exchanged(tmp_path):
    path = tmp_path / "stall.json"
    done = run_command(
        "bench", "stall", "--layers=4", "--slots=3", "--expert-bytes=64", "--step-ms=1",
        "--steps=100", f"--json={path}",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    assert "both need GPUs, and were not measured" in done.out
    result = json.loads(path.read_text())
    assert result["forward_thread_collectives"] == 0
    for kind in ("without", "during"):
        times = result["step_s"][kind]
        assert 0 < times["p50"] <= times["p90"] <= times["p99"] <= times["p100"]
    rows = {row["what"]: row for row in result["rows"]}
    exchanges = rows["exchanges on the forward threads"]
    assert (exchanges["value"], exchanges["goal"], exchanges["met"]) == (0, 0, True)
    assert rows["rebalances"]["value"] >= 2
    assert rows["experts received"]["value"] > 0
    assert rows["steps from plan to last commit, mean"]["value"] >= 1
    assert result["setting"]["steps"] == 100


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--ranks=1", "--ranks must be at least 2, got 1"),
        ("--slots=1", "--slots must be at least 2, got 1"),
        ("--steps=10", "--steps must be at least 50, got 10"),
        ("--step-ms=0", "--step-ms must be a number above 0, got 0.0"),
        ("--max-bytes-per-s=0", "--max-bytes-per-s must be at least 1, got 0"),
        ("--max-bytes-per-step=-1", "--max-bytes-per-step must be at least 1, got -1"),
        ("--max-layers-per-step=0", "--max-layers-per-step must be at least 1, got 0"),
        (
            "--communicator=pigeon",
            "unknown communicator 'pigeon': there are auto, nixl, pynccl, torch_gloo, torch_nccl",
        ),
    ],
)
def test_bad_options_are_refused(tmp_path, option, message):
    done = run_command("bench", "stall", option, f"--json={tmp_path / 'stall.json'}")
    assert (done.code, done.out, done.err) == (2, "", f"equipoise: {message}\n")
    assert list(tmp_path.iterdir()) == []
