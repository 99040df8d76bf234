"""What is said of steps and rebalances, without an exchange on the forward thread."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from equipoise.balancer import RebalanceOutcome
from equipoise.placement import measure_balancedness, spread_load
from tests.background import ServingInBackground
from tests.ranks import Rank, processes
from tests.test_balancer import Serving, in_foreground, skew

NEVER = 1 << 40
WINDOW_STEPS = 4


@contextmanager
def hear(lines: list[str]) -> Iterator[None]:
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("equipoise.balancer.accounting")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield
    logger.removeHandler(handler)


def anybody_heard(serving: Serving, lines: list[str]) -> bool:
    """Whether a rank has; all get the same answer."""
    return any(map(bool, serving.group.all_gather(torch.tensor(bool(lines)))))


@pytest.mark.parametrize("interval", [1, 3])
@processes(2)
def test_balancedness_is_logged_by_the_worker(rank: Rank, interval: int) -> None:
    serving = ServingInBackground(
        rank.make_group(),
        step_interval=NEVER,
        log_balancedness=True,
        log_balancedness_interval=interval,
    )
    serving.add()
    lines: list[str] = []
    with hear(lines):
        # As many as a worker needs, which may get a core late.
        while serving.state.steps < 60 or not anybody_heard(serving, lines):
            serving.step(skew(2))
        serving.close()
    each = measure_balancedness(spread_load(skew(2), serving.placement))
    said = f"model: balancedness {each.mean():.3f} (worst layer {each.min():.3f})"
    # Where steps are shorter than an exchange, one line tells of several.
    steps = range(interval, serving.state.steps + 1, interval)
    assert set(lines) <= {f"step {step}, {said}" for step in steps}
    assert bool(lines) == (rank.rank == 0)


def measure(serving: Serving, outcome: RebalanceOutcome, load: np.ndarray) -> None:
    """Serve as many steps as a rebalance is measured over; they show what it has brought."""
    realised = measure_balancedness(spread_load(load, outcome.placement))
    assert outcome.balancedness_realised is None
    for _ in range(WINDOW_STEPS):
        serving.send_tokens(load)
        serving.state.step()
    while serving.state.stats().models["model"].balancedness_realised is None:
        serving.state.step()
    # Who has seen it soon may close; the other's worker would fail while its steps still wait.
    serving.group.barrier()
    told = serving.state.stats().models["model"].balancedness_realised
    assert told == pytest.approx(realised.mean())


@processes(2)
def test_what_a_rebalance_has_brought_is_measured_after_it(rank: Rank) -> None:
    serving = ServingInBackground(rank.make_group(), window_size=WINDOW_STEPS, step_interval=NEVER)
    serving.add()
    lines: list[str] = []
    with hear(lines):
        serving.step(skew(5))
        serving.state.rearrange()
        (outcome,) = serving.step_until_done(skew(5))
        measure(serving, outcome, skew(3))
        serving.close()
    assert outcome.num_steps == outcome.step - 1
    if rank.rank:
        assert lines == []
        return
    (line,) = lines
    assert line.startswith(f"step {outcome.step}, model: {outcome.moves} experts received")
    assert f"{outcome.bytes / 1e6:.1f} MB" in line
    assert f"in {outcome.transfer_s:.3f} s and {outcome.num_steps} steps" in line
    assert f"{outcome.forward_s * 1e3:.1f} ms of the forward thread" in line
    predicted, before = outcome.balancedness_after.mean(), outcome.balancedness_before.mean()
    assert f"balancedness {before:.3f} -> {predicted:.3f} on the window's load, " in line
    assert line.endswith(" on the steps since")


@processes(2)
def test_the_next_rebalance_ends_the_measure_of_the_last(rank: Rank) -> None:
    serving = ServingInBackground(rank.make_group(), window_size=1000, step_interval=NEVER)
    serving.add()
    realised = []
    for hot in (5, 1):
        serving.step(skew(hot))
        serving.state.rearrange()
        (outcome,) = serving.step_until_done(skew(hot))
        realised.append(serving.state.stats().models["model"].balancedness_realised)
        placement = outcome.placement
    assert realised[0] is None
    # One step of another load, and its plan: what came between the two.
    first = serving.state.stats().models["model"].balancedness_realised
    assert first is not None
    told = serving.group.all_gather(torch.tensor([first], dtype=torch.float64))
    assert all(float(theirs) == first for theirs in told)
    assert placement == serving.maps.placement
    serving.close()


@processes(2)
def test_the_foreground_measures_too(rank: Rank) -> None:
    serving = Serving(
        rank.make_group(), in_foreground(window_size=WINDOW_STEPS, step_interval=NEVER)
    )
    serving.add()
    serving.send_tokens(skew(5))
    serving.state.step()
    (outcome,) = serving.state.rearrange()
    measure(serving, outcome, skew(3))
    serving.close()
