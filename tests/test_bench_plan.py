from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from equipoise.bench.plan import PlanSpec, compare_plans
from equipoise.bench.plan_bounds import bound_peak, bound_peak_in_groups
from equipoise.bench.plan_drift import follow
from equipoise.bench.plan_loads import (
    SHAPES,
    TOKENS,
    Shape,
    draw_load,
    resample_trace,
    walk_load,
)
from equipoise.cli.bench_plan import bench_plan
from equipoise.errors import ConfigError
from equipoise.load.trace import LoadTrace, write_trace
from equipoise.placement import spread_load
from equipoise.policy.deepseek import DeepSeekPolicy
from equipoise.policy.flow import FlowOptions, FlowPolicy
from equipoise.topology import IntArray, Topology

SMALL = Shape("small", 3, 24, Topology(8, 4))


def least_pair(load: list[int], num_ranks: int) -> float:
    """Least possible heaviest pair, by trying all replica counts."""
    best = np.inf
    for counts in product(range(1, num_ranks + 1), repeat=len(load)):
        empty = 2 * num_ranks - sum(counts)
        if empty >= 0:
            shares = np.repeat(np.array(load) / counts, counts)
            slots = np.sort(np.concatenate((np.zeros(empty), shares)))
            best = min(best, float((slots + slots[::-1]).max()))
    return best


@settings(max_examples=60)
@given(st.lists(st.integers(1, 1000), min_size=2, max_size=5), st.integers(3, 4))
def test_no_pairing_beats_the_pairing_bound(load: list[int], num_ranks: int) -> None:
    bound = bound_peak(np.array([load]), Topology(num_ranks, 2))[0]
    assert 0.0 < bound <= least_pair(load, num_ranks) * (1 + 1e-9)


def test_the_pairing_bound_sees_more_than_the_mean() -> None:
    # Three slots of 10 must meet 4 or more on two ranks: the mean is 11, no slot need exceed 10.
    load = np.array([[10, 10, 10, 4, 4, 6]])
    assert bound_peak(load, Topology(3, 2))[0] > 44 / 3


@pytest.mark.parametrize("hierarchy", ["off", "strict"])
@pytest.mark.parametrize("slots", [2, 5])
def test_no_plan_beats_its_bound(hierarchy: str, slots: int) -> None:
    topology = Topology(8, slots, 4)
    load = draw_load("lognormal", Shape("", 5, 8 * slots - 8 * (slots > 2), topology), 3)
    groups = 8 if hierarchy == "strict" else 1
    options = FlowOptions(target=1.0, num_groups=groups, hierarchy=hierarchy)
    most = spread_load(load, FlowPolicy(options).place(load, topology)).max(axis=1)
    if groups == 1:
        bound = bound_peak(load, topology)
    else:
        bound = bound_peak_in_groups(load, topology, groups)
        assert (bound >= bound_peak(load, topology) * (1 - 1e-9)).all()
    assert (most >= bound * (1 - 1e-9)).all()


def test_drawn_loads_are_the_same_each_time_and_differ_by_seed() -> None:
    for kind in ("zipf", "lognormal", "dirichlet"):
        load = draw_load(kind, SMALL, 1)
        assert (load == draw_load(kind, SMALL, 1)).all()
        assert (load != draw_load(kind, SMALL, 2)).any()
        assert load.dtype == np.int64
        assert abs(load.sum(axis=1) - TOKENS).max() <= SMALL.num_experts
    walk = walk_load(SMALL, 0.1, 4, 1)
    step = np.diff(np.log(walk), axis=0)
    # The tokens of a layer sum to the same each time, which takes out what all experts share.
    assert 0.07 < step.std() < 0.13


def test_a_resampled_trace_keeps_its_skew_and_its_drift() -> None:
    random = np.random.default_rng(5)
    first, last = random.integers(1, 1000, (2, 4, 16))
    trace = LoadTrace(np.stack([first, first, last, last]))
    shape = Shape("", 12, 160, Topology(16, 11))
    windows = resample_trace(trace, shape, 4, 0)
    assert (windows[0] == windows[1]).all()
    assert (windows[1] != windows[2]).any()

    def skew(load: IntArray) -> float:
        return float((load.max(axis=-1) / load.mean(axis=-1)).mean())

    assert skew(first) * 0.7 < skew(windows[0]) < skew(first) * 1.3


def test_what_planning_anew_receives_is_counted_before_and_after_matching() -> None:
    windows = walk_load(SMALL, 0.1, 4, 2)
    anew = follow(DeepSeekPolicy(), windows, SMALL)
    ours = follow(FlowPolicy(FlowOptions(move_budget=0.1)), windows, SMALL)
    assert 0.0 < anew.matched < anew.received <= 1.0
    assert 0.0 < ours.received <= 0.1
    assert ours.planned > 0.8


def test_the_rows_carry_goals_and_say_whether_they_are_met() -> None:
    told: list[tuple[int, int]] = []
    spec = PlanSpec(shapes=("EP144",), load_kinds=("lognormal",))
    outcome = compare_plans(spec, lambda _, done, total: told.append((done, total)))
    assert told == [(at, 3) for at in range(3)]
    for row in outcome.rows:
        value, goal = row[row["goal_of"]], row["goal"]
        assert row["met"] == (value <= goal if row["goal_is"] == "at most" else value >= goal)
    whats = [row["what"] for row in outcome.rows]
    assert whats[:2] == ["balance / bound", "time / deepseek's"]
    assert "received / deepseek's" in whats
    first = outcome.rows[0]
    assert first["balance"] >= first["deepseek_balance"]
    assert first["balance"] / first["bound"] == first["value"] <= 1.0


def test_the_command_writes_rows_and_takes_a_trace_of_ones_own(tmp_path: Path) -> None:
    own = tmp_path / "own.npz"
    counts = np.random.default_rng(3).integers(1, 500, (2, 4, 16))
    write_trace(LoadTrace(counts), own)
    app = typer.Typer()
    app.command()(bench_plan)
    done = CliRunner().invoke(
        app,
        ["--shape=EP32", "--load=lognormal", f"--trace={own}", f"--json={tmp_path / 'x.json'}"],
        catch_exceptions=False,
    )
    assert done.exit_code == 0
    assert "no next window for own: fewer than 6 steps" in done.output
    result = json.loads((tmp_path / "x.json").read_text())
    assert result["bench"] == "plan"
    assert {row["load"] for row in result["rows"]} >= {"lognormal", "own", "walk 0.1"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape=EP31"], "there is no shape 'EP31': there are EP32"),
        (["--load=uniform"], "there is no load 'uniform': there are zipf"),
        (["--quick", "--shape=EP32"], "--quick chooses the shapes"),
        (["--seed=-1"], "seed must be 0 or more, got -1"),
    ],
)
def test_what_cannot_be_compared_is_refused(options: list[str], message: str) -> None:
    app = typer.Typer()
    app.command()(bench_plan)
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, options, catch_exceptions=False)


def test_every_shape_can_be_planned() -> None:
    for shape in SHAPES.values():
        assert shape.num_experts <= shape.topology.num_slots
        assert shape.num_groups % shape.topology.num_nodes == 0 or shape.num_groups == 1
