"""`equipoise bench layer` and `bench load`: small cases through real ranks, and refusals."""

from __future__ import annotations

import json

import pytest

from tests.command_line import run_command


def test_a_layer_is_compared_with_transformers_in_one_run(tmp_path):
    path = tmp_path / "layer.json"
    done = run_command(
        "bench", "layer", "--device=cpu", "--tokens=8", "--rounds=2", f"--json={path}"
    )
    assert (done.code, done.err) == (0, "")
    assert "needs two GPUs: tokens over NCCL" in done.out
    uniform, skewed = json.loads(path.read_text())["rows"]
    assert (uniform["routing"], uniform["wire"], uniform["tokens_per_rank"]) == (
        "uniform",
        "gloo",
        8,
    )
    assert (uniform["goal_of"], uniform["goal_is"], uniform["goal"]) == ("ratio", "at most", 1.0)
    assert uniform["met"] == (uniform["seconds"] <= uniform["peer_seconds"])
    assert set(uniform["seconds_of_rounds"]) == {"ours", "theirs"}
    assert "goal" not in skewed
    assert skewed["gain"] == skewed["in_order_seconds"] / skewed["seconds"]
    assert 1 <= skewed["balanced_imbalance"] < skewed["imbalance"]
    assert {len(several) for several in skewed["seconds_of_rounds"].values()} == {2}


def test_a_load_is_compared_with_a_plain_read_and_leaves_nothing(tmp_path):
    path, folder = tmp_path / "load.json", tmp_path / "folder"
    folder.mkdir()
    done = run_command(
        "bench",
        "load",
        str(folder),
        "--device=cpu",
        "--gigabytes=0.05",
        "--rounds=1",
        f"--json={path}",
    )
    assert (done.code, done.err) == (0, "")
    assert "The goal is for two GPUs" in done.out
    result = json.loads(path.read_text())
    cold, warm = result["rows"]
    assert (cold["cache"], warm["cache"]) == ("cold", "warm")
    for row in (cold, warm):
        assert "goal" not in row
        assert row["ratio"] == row["plain_seconds"] / row["seconds"]
        # Two ranks read their experts once, and what both have twice.
        assert 0 < row["file_bytes"] < row["bytes_read"] < 2 * row["file_bytes"]
        assert row["first_byte_s"] + row["last_byte_s"] < row["seconds"]
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("layer", "--ranks=1"), "--ranks must be at least 2, got 1"),
        (("layer", "--rounds=0"), "--rounds must be at least 1, got 0"),
        (("layer", "--tokens=0"), "--tokens must be at least 1, got 0"),
        (("layer", "--skew=0"), "--skew must be a number above 0, got 0.0"),
        (("layer", "--kernels=x"), "--kernels must be grouped_mm, batched_mm or eager, got x"),
        (
            ("layer", "--device=cpu", "--ranks=3"),
            "32 experts and 4 redundant slots cannot be spread evenly over 3 ranks: take another "
            "number of ranks",
        ),
        (("load", "FOLDER", "--gigabytes=0"), "--gigabytes must be a number above 0, got 0.0"),
        (("load", "FOLDER", "--rounds=0"), "--rounds must be at least 1, got 0"),
        (
            ("load", "FOLDER", "--device=cpu", "--ranks=3"),
            "32 experts cannot be spread evenly over 3 ranks: take another number of ranks",
        ),
        (("load", "FOLDER/nowhere"), "FOLDER/nowhere: no such folder"),
    ],
)
def test_bad_options_are_refused(tmp_path, arguments, message):
    given = [one.replace("FOLDER", str(tmp_path)) for one in arguments]
    done = run_command("bench", *given, f"--json={tmp_path / 'out.json'}")
    wanted = message.replace("FOLDER", str(tmp_path))
    assert (done.code, done.out, done.err) == (2, "", f"equipoise: {wanted}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused(tmp_path):
    done = run_command("bench", "load", str(tmp_path), "--gigabytes=1e6", "--device=cpu")
    assert (done.code, done.out) == (2, "")
    assert "GB free, but the files take" in done.err
    assert list(tmp_path.iterdir()) == []
