"""What a terminal, or a log, shows of a job while it runs."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
from rich.console import Console

from equipoise.job.records import (
    JobRecord,
    PhaseRecord,
    Record,
)
from equipoise.placement import place_in_order
from equipoise.report.live import LiveDisplay, render_progress
from equipoise.report.plain import PlainDisplay
from equipoise.report.summary import JobSummary, write_sentence
from equipoise.topology import Topology
from tests.report_job import (
    JOB,
    OFF,
    ON,
    RESULT,
    make_rebalance,
    make_step,
)


def draw(summary: JobSummary, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(render_progress(summary, width))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def begin(
    records: Iterable[Record], job: JobRecord = JOB, phase: Literal["off", "on"] = "on"
) -> JobSummary:
    summary = JobSummary()
    for record in (job, PhaseRecord(phase), *records):
        summary.add(record)
    return summary


def test_the_live_picture_shows_loads_balance_and_moves() -> None:
    # Rank 0 has got 8 + 5, 6 + 4, 6 + 4 of 20, 20, 12 tokens: 1.27 of its share.
    assert draw(begin(ON), 80) == [
        "serving, balancing on   step 3   text: code",
        "tokens per rank, last 3 steps (1.00 is its share)",
        "rank 0 1.27 " + "█" * 30,
        "rank 1 0.73 " + "█" * 18,
        "balancedness per layer, same steps (1.00 is perfect)",
        "                   layer 0  layer 1",
        "initial placement  0.83     0.85",
        "now                0.75     0.85",
        "last moves of experts, balancedness of the window",
        "step 1  2 moved  0 within ranks  2.0 kB  300 ms  0.75 -> 1.00",
    ]


def test_without_balancing_there_is_nothing_to_compare_layers_with() -> None:
    # Rank 0 has got 8 + 5, 8 + 4, 2 + 4 of 20, 20, 12 tokens: 1.19 of its share.
    assert draw(begin(OFF, phase="off"), 80) == [
        "serving, balancing off   step 3   text: code",
        "tokens per rank, last 3 steps (1.00 is its share)",
        "rank 0 1.19 " + "█" * 29,
        "rank 1 0.81 " + "█" * 19,
        "balancedness per layer, same steps (1.00 is perfect)",
        "     layer 0  layer 1",
        "now  0.83     0.85",
    ]


def test_the_live_picture_says_what_is_going_on_before_there_are_steps() -> None:
    assert draw(JobSummary(), 80) == ["starting ranks and loading the model"]
    assert draw(begin([]), 80) == ["serving, balancing on"]


@pytest.mark.parametrize("width", [40, 60, 80, 100])
def test_the_live_picture_of_a_large_model_fits(width: int) -> None:
    placement = place_in_order(48, 128, Topology(64, 2))
    rng = np.random.default_rng(0)
    steps = [
        make_step("on", 1000 + n, "mathematics", rng.integers(0, 999, (48, 128)), placement)
        for n in range(20)
    ]
    rebalances = [
        replace(make_rebalance(n, placement, moves=4321), local_moves=1234, bytes=9.9e9)
        for n in range(1000, 1006)
    ]
    lines = draw(begin([*steps, *rebalances], replace(JOB, placement=placement)), width)
    assert len(lines) <= 24
    assert all(len(line) <= width for line in lines)
    assert sum(line.startswith("rank ") for line in lines) == 12
    assert "the heaviest 12 of 64 ranks" in lines
    assert any(line.endswith(" of 48") for line in lines)
    assert [line.split()[:2] for line in lines[-4:]] == [
        ["step", str(n)] for n in range(1002, 1006)
    ]
    # Only titles may be cut.
    assert not any("…" in line for line in lines if width >= 60 or line.startswith("rank "))


def show_all(display: Any, summary: JobSummary) -> None:
    passes: list[Record] = [PhaseRecord("off"), *OFF, PhaseRecord("loss"), PhaseRecord("on"), *ON]
    for record in (JOB, *passes, PhaseRecord("check"), RESULT):
        summary.add(record)
        display.show(record)
    display.close()


def test_plain_lines_say_what_changes() -> None:
    out, summary = io.StringIO(), JobSummary()
    show_all(PlainDisplay(Console(file=out, width=100), summary), summary)
    lines = out.getvalue().splitlines()
    job = (
        "/models/small: 2.6 M parameters in float32, 2 MoE layers of 4 experts and 0 redundant "
        "slots on 2 ranks (cpu); policy deepseek, weights travel by torch_gloo"
    )
    assert lines[:12] == [
        job,
        "serving, balancing off",
        "step 1: text is prose",
        "step 3: text is code",
        "scoring held-out text",
        "serving, balancing on",
        "step 1: text is prose",
        "step 1: 2 experts moved, 2.0 kB in 300 ms (planned in 12 ms); balancedness of the window "
        "0.75 -> 1.00",
        "step 3: text is code",
        "comparing with the plain model in one process",
        "Slowest rank's load over its share, steps 2 to 3 with balancing on",
        "kind of text  initial placement  as balanced",
    ]
    assert [line.split() for line in lines if line.startswith(("all", "off", "on"))] == [
        ["all", "1.38", "1.25"],
        ["off", "6", "4", "0.50", "0.35"],
        ["on", "6", "3", "0.50", "0.35"],
    ]
    assert " ".join(lines[-2:]).split() == write_sentence(summary).split()


def test_a_terminal_gets_its_screen_back_with_the_closing_tables() -> None:
    out, summary = io.StringIO(), JobSummary()
    console = Console(file=out, width=100, height=40, force_terminal=True, color_system=None)
    show_all(LiveDisplay(console, summary), summary)
    said = out.getvalue()
    assert said.count("\x1b[?25l") == said.count("\x1b[?25h") == 1  # the cursor, off and on again
    closing = said[said.rindex("\x1b[?25h") :]
    assert "Slowest rank's load over its share, steps 2 to 3 with balancing on" in closing
    assert "rank 0 1.27" not in closing


def test_a_job_that_did_not_end_shows_no_closing_tables() -> None:
    out, summary = io.StringIO(), JobSummary()
    display = PlainDisplay(Console(file=out, width=100), summary)
    for record in (JOB, PhaseRecord("off")):
        summary.add(record)
        display.show(record)
    display.close()
    assert out.getvalue().splitlines()[1:] == ["serving, balancing off"]
