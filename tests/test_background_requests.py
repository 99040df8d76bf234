"""What one rank asks for, all ranks do at one step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch

from equipoise.balancer.background import POLL_STEPS, Background
from equipoise.balancer.orders import Order
from equipoise.errors import ConfigError, TransferError
from tests.background import Outcomes, ServingInBackground
from tests.ranks import Rank, processes
from tests.test_balancer import NUM_EXPERTS, Serving, in_foreground, skew

NEVER = 1 << 40


def ask(serving: ServingInBackground, rank: int, what: str) -> None:
    """Ask on this rank alone, from a thread of its own."""
    if serving.group.rank == rank:
        thread = threading.Thread(target=serving.state.request, args=(what,))
        thread.start()
        thread.join(20.0)


def step_until(serving: ServingInBackground, is_done: Callable[[], bool]) -> Outcomes:
    """Step without lockstep until something is so, which it must be at one step everywhere."""
    outcomes: Outcomes = ()
    for _ in range(100_000):
        # A forward pass that takes its time, so that the workers get theirs.
        time.sleep(0.001)
        outcomes += serving.step_alone(skew(serving.state.steps % NUM_EXPERTS))
        if is_done():
            steps = serving.group.all_gather(torch.tensor([serving.state.steps]))
            assert len({int(theirs) for theirs in steps}) == 1
            return outcomes
    raise AssertionError("nothing comes of it")


@processes(3)
def test_one_rank_begins_a_rebalance_on_all(rank: Rank) -> None:
    serving = ServingInBackground(rank.make_group(), window_size=4, step_interval=NEVER)
    serving.add()
    for asks in (2, 0):
        ask(serving, asks, "rearrange")
        began = serving.state.stats().models["model"].rebalances
        outcomes = step_until(
            serving, lambda began=began: serving.state.stats().models["model"].rebalances > began
        )
        (outcome,) = outcomes
        told = serving.group.all_gather(torch.tensor([outcome.planned_step, outcome.step]))
        assert all(torch.equal(told[0], theirs) for theirs in told)
    serving.close()


@pytest.mark.parametrize("step_interval", [1, NEVER], ids=["amid rebalances", "at rest"])
@processes(3)
def test_one_rank_pauses_and_resumes_all(rank: Rank, step_interval: int) -> None:
    serving = ServingInBackground(rank.make_group(), window_size=4, step_interval=step_interval)
    serving.add()
    serving.step(skew(1))
    state = serving.state
    for _ in range(2):
        ask(serving, 1, "pause")
        step_until(serving, lambda: state.is_paused)
        step_until(serving, lambda: not state.is_rebalancing)
        for _ in range(2 * POLL_STEPS):
            assert serving.step(skew(2)) == ()
            assert not state.is_rebalancing
        ask(serving, 2, "resume")
        step_until(serving, lambda: not state.is_paused)
    if step_interval == 1:
        step_until(serving, lambda: state.is_rebalancing)
    serving.close()


@processes(2)
def test_what_a_rank_asks_for_comes_in_its_order(rank: Rank) -> None:
    serving = ServingInBackground(rank.make_group(), window_size=4, step_interval=NEVER)
    serving.add()
    for what in ("pause", "rearrange", "resume", "pause", "stop"):
        ask(serving, 1, what)
    state = serving.state
    followed: list[Order] = []
    follow = Background._follow

    def note(background: Background, order: Order, step: int) -> None:
        # Not seen from outside: one step may follow two of them.
        followed.append(order)
        follow(background, order, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Background, "_follow", note)
        outcomes = step_until(serving, lambda: state.stats().failure is not None)
    orders = [Order.PAUSE, Order.REARRANGE, Order.RESUME, Order.PAUSE, Order.STOP]
    assert [order for order in followed if order is not Order.NONE] == orders
    assert state.is_paused
    assert len(outcomes) == 1, "what is asked for begins while paused"
    assert state.stats().failure == "a rank has stopped it"
    with pytest.raises(TransferError, match="balancing has ended: a rank has stopped it"):
        state.request("resume")
    state.rearrange()
    assert not state.is_rebalancing
    serving.step(skew(1))
    serving.close()


@processes(2)
def test_ranks_that_ask_at_once_are_both_heard(rank: Rank) -> None:
    serving = ServingInBackground(rank.make_group(), window_size=4, step_interval=NEVER)
    serving.add()
    serving.state.request("rearrange")
    outcomes = step_until(serving, lambda: serving.state.stats().models["model"].rebalances == 2)
    assert len(outcomes) == 2
    serving.close()


@processes(1)
def test_what_cannot_be_asked_for_is_said(rank: Rank) -> None:
    group = rank.make_group()
    serving = ServingInBackground(group)
    with pytest.raises(ConfigError, match="cannot ask for 'faster': ask for one of rearrange, "):
        serving.state.request("faster")  # type: ignore[arg-type]
    serving.close()
    foreground = Serving(rank.make_group(generation=1), in_foreground())
    with pytest.raises(ConfigError, match="call the method of that name on every rank"):
        foreground.state.request("rearrange")
    foreground.close()
