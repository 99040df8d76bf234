"""`equipoise bench serve`: both ways serve the same, and what was measured is judged."""

from __future__ import annotations

import json
from typing import Any

import pytest

from equipoise.errors import ConfigError
from equipoise.server.one_rank import OneRankService
from equipoise.server.overhead import OverheadSpec, measure_overhead
from tests.command_line import run_command
from tests.server.serving import make_spec


def test_both_ways_are_measured_in_turns() -> None:
    outcome = measure_overhead(
        lambda: OneRankService(make_spec()), OverheadSpec(3, 5, 2), {"ranks": 1}
    )
    told: dict[str, Any] = json.loads(outcome.to_json())
    (row,) = told["rows"]
    assert row["alone_tokens_per_s"] > 0
    assert row["http_tokens_per_s"] > 0
    assert row["overhead_least"] <= row["overhead"] <= row["overhead_most"] < 1
    assert (row["goal"], row["goal_is"]) == (0.1, "at most")
    assert row["met"] == (row["overhead"] <= 0.1)
    assert told["setting"] == {"ranks": 1, "num_streams": 3, "num_tokens": 5, "num_rounds": 2}


def test_a_service_that_cannot_start_is_told() -> None:
    with pytest.raises(ConfigError, match="one process serves on one rank, not 2"):
        measure_overhead(_make_two, OverheadSpec(1, 1, 1), {})


def _make_two() -> OneRankService:
    from dataclasses import replace

    return OneRankService(replace(make_spec(), num_ranks=2))


@pytest.mark.parametrize("flag", ["--streams", "--tokens", "--rounds"])
def test_none_of_something_is_refused(flag: str) -> None:
    done = run_command("bench", "serve", f"{flag}=0")
    assert (done.code, done.err) == (2, f"equipoise: {flag} must be at least 1, got 0\n")


@pytest.mark.parametrize(("case", "flag"), [("overhead", "--kills"), ("kill", "--ranks")])
def test_an_option_that_would_do_nothing_is_refused(case: str, flag: str) -> None:
    done = run_command("bench", "serve", f"--case={case}", f"{flag}=3")
    assert (done.code, done.err) == (2, f"equipoise: {flag} is not for --case {case}\n")
