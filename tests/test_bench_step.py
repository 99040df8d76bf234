"""`bench step`: what it says of steps, and that its tokens go where they should."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from equipoise.bench import step_model
from equipoise.bench.step import _advise, _make_rows, compare_steps
from equipoise.bench.step_case import (
    BUNDLED,
    SCALED,
    Compared,
    Setting,
    StepSpec,
    Timed,
)
from equipoise.bench.step_loads import read_shares
from equipoise.bench.step_model import Routes, build_model
from equipoise.bench.step_parts import StepClock
from equipoise.bench.step_prediction import (
    ExpertTime,
    TimedExperts,
    find_centre,
    find_p99_ratio_error,
    fit_plane,
    predict_experts,
    sum_slowest,
)
from equipoise.cli.app import app
from equipoise.comm.groups import RankGroup
from equipoise.config import EPLBConfig
from equipoise.dispatch import create_dispatcher
from equipoise.dispatch.base import DispatchedBlocks, TokenDispatcher
from equipoise.dispatch.nixl_ep.all_to_all import NixlEPAll2AllManager
from equipoise.dispatch.nixl_ep.dispatcher import NixlEPOptions
from equipoise.engine.graphs import _round_up
from equipoise.errors import ConfigError
from equipoise.models.experts import compute_dispatched
from equipoise.models.parallel import parallelize
from equipoise.topology import Topology
from tests.fake_nixl_ep import FakeFabric, FakeKernels
from tests.ranks import Rank, processes
from tests.test_models import CPU, make_lone_group

SMALL = StepSpec(
    cases=("prefill", "recorder", "stall", "graphs"),
    prefill_tokens=64,
    prompt_len=16,
    decode_size=4,
    num_steps=10,
    num_stall_steps=50,
    communicator="torch_gloo",
)


@pytest.mark.timeout(300)
def test_every_case_is_measured_or_says_what_it_needs() -> None:
    heard = []
    outcome = compare_steps(SMALL, heard.append)
    assert isinstance(heard[0], Setting)
    assert [said.case for said in heard[1:]] == ["prefill", "recorder", "stall", "graphs"]
    stall = next(said for said in heard if isinstance(said, Compared) and said.case == "stall")
    assert stall.rebalances > 0
    assert stall.moves > 0
    assert len(stall.off.step_s) == len(stall.on.step_s) == 50

    told = json.loads(outcome.to_json())
    assert told["left_out"].keys() == {"recorder", "graphs"}
    rows = {(row["case"], row["what"]): row for row in told["rows"]}
    before, after = rows["prefill", "as it came"], rows["prefill", "balanced"]
    assert before["num_steps"] == after["num_steps"] == 10
    assert before["imbalance"] > after["imbalance"] >= 1
    assert before["tokens_per_s"] > 0
    for row in (before, after):
        parts = row["parts"]
        by_rank = parts.pop("experts_s")
        assert len(by_rank) == 2
        # Of one rank that was the slowest in every layer both are the same.
        assert 0 < max(by_rank) <= parts["slowest_experts_s"] * (1 + 1e-9) < sum(by_rank)
        assert min(by_rank) > 0
        assert min(parts.values()) > 0
    gain = rows["prefill", "gain over the predicted one"]
    prefill = next(said for said in heard if isinstance(said, Compared) and said.case == "prefill")
    assert gain["gained_s"] == find_centre(prefill.off.step_s - prefill.on.step_s)[0]
    assert prefill.experts is not None
    assert prefill.experts.off_s.min() > 0
    for step_s in told["step_s"]["prefill"]:
        assert len(step_s) == 10
    assert gain["moves"] > 0
    assert not any("goal" in row for row in told["rows"])
    assert any(note.startswith("Goals are for GPUs") for note in outcome.notes)


def test_over_torch_on_gpus_it_says_where_no_host_is_waited_for() -> None:
    spec = StepSpec(device="cuda", cases=("prefill", "decode"))
    (note,) = _advise(spec)
    assert "--case prefill --dispatcher nixl_ep" in note
    assert not _advise(replace(spec, dispatcher="nixl_ep"))
    assert not _advise(replace(spec, cases=("decode",)))


@processes(2)
def test_a_layer_takes_as_long_as_its_slowest_rank(rank: Rank) -> None:
    """Two steps alike of two layers: rank 0 is the slower in the first, rank 1 in the second."""
    group = rank.make_group()
    clock = StepClock(group, create_dispatcher("torch", group, Topology(2, 1)))
    experts_s = ((3.0, 1.0), (1.0, 2.0))[rank.rank]
    clock._steps = [torch.tensor([[0.5, seconds, 0.25, 0.125] for seconds in experts_s])] * 2
    parts = clock.sum_up()
    assert (parts.experts_s, parts.slowest_experts_s) == ((4.0, 3.0), 3.0 + 2.0)
    assert (parts.dispatch_s, parts.combine_s, parts.between_s) == (1.0, 0.5, 0.25)
    group.barrier()


def test_a_prediction_is_the_slowest_ranks_of_each_layer() -> None:
    """Two steps of one layer: ranks with 10 and 30 rows in 2 and 4 slots, and 20 and 20 in 3."""
    rows = np.array([[[10, 30]], [[20, 20]]])
    slots = np.array([[[2, 4]], [[3, 3]]])
    time = ExpertTime(1.0, 0.1, 10.0, 0.0)
    assert predict_experts((time, time), rows, slots, 2) == pytest.approx((44 + 33) / 2)
    # Of one device they compute one after the other.
    assert predict_experts((time, time), rows, slots, 1) == pytest.approx((22 + 44 + 33 + 33) / 2)
    # A device that is slower is waited for at an even load.
    slow = ExpertTime(1.0, 0.2, 10.0, 0.0)
    assert predict_experts((slow, time), rows, slots, 2) == pytest.approx((44 + 35) / 2)
    # Two layers of four ranks that take turns over two devices.
    seconds = np.array([[[1.0, 2.0, 3.0, 4.0], [5.0, 1.0, 0.0, 2.0]]])
    assert sum_slowest(seconds, 4) == 4 + 5
    assert sum_slowest(seconds, 2) == (2 + 4) + 5


def test_a_plane_is_found_again() -> None:
    random = np.random.default_rng(0)
    slot_count = random.integers(0, 100, (30, 6)) * random.integers(0, 2, (30, 6))
    want = ExpertTime(3e-4, 4e-8, 2e-6, 0.0)
    seconds = want.predict(slot_count.sum(1), (slot_count > 0).sum(1))
    found = fit_plane(slot_count, seconds)
    assert (found.fixed_s, found.token_s, found.slot_s) == pytest.approx((3e-4, 4e-8, 2e-6))
    assert found.worst < 1e-6


def test_what_values_lie_around_is_not_moved_by_a_few_of_them() -> None:
    random = np.random.default_rng(0)
    draws = random.normal(2.0, 1.0, (200, 60))
    draws[:, :5] += 100.0
    centres, errors = np.array([find_centre(draw) for draw in draws]).T
    assert abs(centres.mean() - 2.0) < 0.2
    # The error is what centres scatter by; outliers widen it a little.
    assert centres.std() == pytest.approx(errors.mean(), rel=0.3)


def test_a_p99_on_gpus_is_told_with_its_goal_and_its_error() -> None:
    """Of times that were made up: the goal is for 2,000 steps, of which there must be as many."""
    random = np.random.default_rng(0)
    nothing = np.zeros((2000, 1, 2), dtype=np.int64)
    off, on = (
        Timed(random.normal(0.01, 1e-4, 2000) * more, np.zeros(2000), 2000, nothing, nothing)
        for more in (1.0, 1.02)
    )
    said = Compared("stall", off, on, moves=40, rebalances=20)
    *_, row = _make_rows(said, replace(SMALL, device="cuda", num_stall_steps=2000), 2)
    assert row["value"] == pytest.approx(1.02, abs=0.01)
    assert row["met"]
    assert 0 < row["value_error"] < 0.01
    *_, row = _make_rows(said, SMALL, 2)
    assert "goal" not in row


def test_a_gain_on_gpus_is_judged_by_the_planes_of_the_ranks() -> None:
    """Two ranks, 24 layers of 50 us: 3,000 rows more than the mean come to one, and to none."""
    rows = np.full((40, 24, 2), 30_000) + np.array([3000, -3000])
    slots = np.full((40, 24, 2), 65)
    plane = ExpertTime(5e-5, 5e-8, 0.0, 0.0)
    predicted = 24 * 3000 * 5e-8
    random = np.random.default_rng(0)
    step_s = 0.1 + 1e-4 * random.normal(0, 1, (2, 40)) + np.array([[0.95 * predicted], [0.0]])
    off = Timed(step_s[0], np.zeros(40), 40, rows, slots)
    on = Timed(step_s[1], np.zeros(40), 40, np.full_like(rows, 30_000), slots)
    loads = plane.predict(rows, slots)[:2], plane.predict(on.rank_tokens, slots)[:2]
    said = Compared("prefill", off, on, TimedExperts((plane, plane), *loads))
    spec = replace(SMALL, size=SCALED, device="cuda", prefill_tokens=4096)
    *_, row = _make_rows(said, spec, 2)
    assert row["predicted_s"] == pytest.approx(predicted)
    assert row["timed_loads_s"] == pytest.approx(predicted)
    busy, mean = (24 * (5e-5 + 5e-8 * rows) for rows in (33_000, 30_000))
    assert np.array(row["alone_s"]) == pytest.approx(
        np.array([[busy, 2 * mean - busy], [mean] * 2])
    )
    assert row["value"] == pytest.approx(0.95, abs=0.03)
    assert row["met"] == (row["value"] >= 0.9)
    # Ranks that share a device are no case of the goal.
    assert "goal" not in _make_rows(said, spec, 1)[-1]


def test_the_error_of_a_p99_is_what_runs_scatter_by() -> None:
    random = np.random.default_rng(0)
    # In one block of ten everything is slow.
    slow = 1 + 0.2 * (random.random((80, 2, 20, 1)) < 0.1)
    runs = slow * random.normal(1.0, 0.01, (80, 2, 20, 100))
    off_s, on_s = runs.reshape(80, 2, 2000).swapaxes(0, 1)
    ratios = np.percentile(on_s, 99, axis=1) / np.percentile(off_s, 99, axis=1)
    errors = [find_p99_ratio_error(*pair, 100) for pair in zip(off_s, on_s, strict=True)]
    assert 0.5 < np.mean(errors) / np.std(ratios) < 2
    assert find_p99_ratio_error(on_s[0], on_s[0], 2000) == 0


def test_tokens_go_to_experts_as_often_as_their_shares_say() -> None:
    model = build_model(BUNDLED, torch.float32, CPU, 0)
    parallel = parallelize(model, make_lone_group(), EPLBConfig(use_async=False))
    shares = read_shares(BUNDLED, "gpqa_main")
    routes = Routes(parallel, shares, BUNDLED.top_k, 0)
    for row, pool in enumerate(routes._pools):
        assert pool.sort(dim=1).values.diff(dim=1).min() > 0
        often = np.bincount(pool.flatten(), minlength=32) / len(pool)
        want = shares[row] / shares[row].sum() * BUNDLED.top_k
        assert np.abs(often - np.minimum(want, 1)).max() < 0.05
    before = routes._pools[1].clone()
    routes.rename_experts()
    assert not torch.equal(before, routes._pools[1])


@pytest.mark.parametrize("name", ["torch", "nixl_ep"])
def test_experts_are_timed_with_what_layers_call(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows or blocks, of the shapes that dispatch leaves, with the loads that were asked for."""
    manager = NixlEPAll2AllManager(1, CPU, timedelta(seconds=20), kernels=FakeKernels(FakeFabric()))

    def make_dispatcher(group: RankGroup, topology: Topology) -> TokenDispatcher:
        options = NixlEPOptions(manager, 24, BUNDLED.hidden_size)
        return create_dispatcher(name if name == "torch" else options, group, topology)

    model = build_model(BUNDLED, torch.bfloat16, CPU, 0)
    parallel = parallelize(
        model, make_lone_group(), EPLBConfig(use_async=False), dispatcher=make_dispatcher
    )
    hidden = torch.randn(24, BUNDLED.hidden_size).bfloat16()
    chosen = torch.rand(24, 32).topk(BUNDLED.top_k).indices
    real = parallel.dispatchers[0].dispatch(hidden, chosen)
    num_slots = parallel.spread.maps.placement.num_slots
    slot_count = torch.stack(
        [chosen.flatten().bincount(minlength=num_slots), torch.arange(num_slots) % 3]
    )
    timed: list[Any] = []

    def compute(module: Any, dispatched: Any, top_k: int) -> None:
        timed.append(dispatched)
        output = compute_dispatched(module, dispatched, top_k)
        assert output.shape == (real.hidden_SCD if is_blocks else dispatched.hidden_ND).shape

    is_blocks = isinstance(real, DispatchedBlocks)
    assert is_blocks == (name == "nixl_ep")
    monkeypatch.setattr(step_model, "compute_dispatched", compute)
    seconds = step_model.measure_experts(parallel, slot_count)
    assert seconds.shape == (2,)
    assert seconds.min() > 0
    for index, dispatched in enumerate(timed):
        assert isinstance(dispatched, DispatchedBlocks) == is_blocks
        assert torch.equal(dispatched.slot_N.bincount(minlength=num_slots), slot_count[index % 2])
        assert dispatched.hidden_ND.shape == (len(dispatched.slot_N), BUNDLED.hidden_size)
        assert dispatched.hidden_ND.dtype == real.hidden_ND.dtype
        if is_blocks:
            assert dispatched.hidden_SCD.shape == real.hidden_SCD.shape
            assert dispatched.max_rows == real.max_rows
            assert dispatched.count_S.dtype == real.count_S.dtype
            assert torch.equal(dispatched.count_S.long(), slot_count[index % 2])
    parallel.close()
    manager.close()


def test_graphs_are_few() -> None:
    assert [_round_up(rows, 48) for rows in (1, 2, 3, 16, 17, 33, 48)] == [1, 2, 4, 16, 32, 48, 48]
    assert [_round_up(keys, 500, 128) for keys in (1, 128, 129, 400)] == [128, 128, 256, 500]


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    for changes, message in (
        ({"num_ranks": 1}, "--ranks must be at least 2, got 1"),
        ({"num_steps": 9}, "--steps must be at least 10, got 9"),
        ({"num_stall_steps": 0}, "--stall-steps must be at least 1, got 0"),
        ({"prefill_tokens": 15}, "--prefill-tokens must be at least 16, got 15"),
        ({"cases": ("prefill", "nap")}, "--case: there are prefill, .*, not 'nap'"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(SMALL, **changes)
    for words, message in (
        (["--case", "nap"], "--case: there are prefill"),
        (["--dispatcher", "foo"], "--dispatcher: there are torch, nixl_ep, not 'foo'"),
        (["--kind", "nonsense"], "--kind: the trace has gpqa_main"),
        (["--eplb-config", '{"window_size": 3}'], "window_size is the bench's own"),
    ):
        result = CliRunner().invoke(app, ["bench", "step", "--device", "cpu", *words])
        assert isinstance(result.exception, ConfigError)
        assert str(result.exception).startswith(message) or message in str(result.exception)
