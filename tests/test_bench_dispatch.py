"""`equipoise bench dispatch` and `bench record`: small cases through real ranks, and refusals."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

from equipoise.bench.dispatch import compare_dispatch
from equipoise.bench.dispatch_case import DispatchCase, DispatchSpec
from tests.command_line import run_command


def test_a_small_case_is_compared_with_transformers_in_one_run(tmp_path):
    path = tmp_path / "dispatch.json"
    done = run_command(
        "bench", "dispatch", "--device=cpu", "--tokens=16", "--rounds=3", f"--json={path}"
    )
    assert (done.code, done.err) == (0, "")
    assert "need two GPUs: torch over NCCL, and nixl_ep" in done.out
    result = json.loads(path.read_text())
    (row,) = result["rows"]
    assert (row["backend"], row["wire"], row["tokens_per_rank"]) == ("torch", "gloo", 16)
    assert row["peer"] == "transformers' all_to_all"
    assert (row["goal_of"], row["goal_is"], row["goal"]) == ("ratio", "at most", 0.7)
    assert row["ratio"] == row["seconds"] / row["peer_seconds"]
    assert row["met"] == (row["ratio"] <= 0.7)
    assert len(row["seconds_of_rounds"]) == len(row["peer_seconds_of_rounds"]) == 3


def test_a_case_that_fails_costs_itself_alone():
    good = DispatchCase("torch", 8, 64, 2, 8, 1)
    bad = replace(good, top_k=9)
    spec = DispatchSpec((good, bad, replace(good, num_tokens=4)), num_rounds=1)
    outcome = compare_dispatch(spec, "cpu")
    assert [row["tokens_per_rank"] for row in outcome.rows] == [8, 4]
    (failed,) = outcome.figures["failed"]
    assert (failed["backend"], failed["case"]) == ("torch", bad.name)
    assert re.match(r"rank [01] failed: RuntimeError", failed["error"])
    assert f"torch, {bad.name}: FAILED, {failed['error']}" in outcome.notes


def test_a_failed_case_is_an_error_of_the_command(tmp_path):
    path = tmp_path / "dispatch.json"
    done = run_command("bench", "dispatch", "--device=cpu", f"--tokens={10**15}", f"--json={path}")
    assert done.code == 2
    assert "equipoise: 1 of 1 cases failed: torch, 1000000000000000 x 2048" in done.err
    assert len(json.loads(path.read_text())["failed"]) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_kernel_is_not_measured_without_a_gpu_and_that_is_said(tmp_path):
    path = tmp_path / "record.json"
    done = run_command("bench", "record", f"--json={path}")
    assert (done.code, done.err) == (0, "")
    assert "every case needs a GPU, and torch sees none" in done.out
    assert json.loads(path.read_text())["rows"] == []


@pytest.mark.parametrize(
    ("bench", "option", "message"),
    [
        ("dispatch", "--ranks=1", "--ranks must be at least 2, got 1"),
        ("dispatch", "--rounds=0", "--rounds must be at least 1, got 0"),
        ("dispatch", "--tokens=0", "--tokens must be at least 1, got 0"),
        ("dispatch", "--timeout=0", "--timeout must be a number above 0, got 0.0"),
        (
            "dispatch",
            "--ranks=3",
            "128 experts cannot be spread evenly over 3 ranks, as transformers does it: take "
            "another number of ranks",
        ),
        ("record", "--tokens=0", "--tokens must be at least 1, got 0"),
        ("record", "--experts=4", "a token cannot choose 8 of 4 experts"),
        ("record", "--slots=9", "9 slots cannot hold 256 experts: ask for as many"),
    ],
)
def test_bad_options_are_refused(tmp_path, bench, option, message):
    done = run_command("bench", bench, option, f"--json={tmp_path / 'out.json'}")
    assert (done.code, done.out, done.err) == (2, "", f"equipoise: {message}\n")
    assert list(tmp_path.iterdir()) == []
