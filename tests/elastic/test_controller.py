"""A service of real ranks: tokens as the plain model's, through all that its operator asks for."""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from equipoise.bundled import model_directory
from equipoise.config import EPLBConfig
from equipoise.elastic.control import ControlSocket, ask
from equipoise.elastic.controller import Controller
from equipoise.elastic.service import (
    QueueFull,
    RequestFailed,
    ServiceClosed,
    ServiceRequest,
)
from equipoise.engine.requests import SamplingParams
from equipoise.errors import ConfigError, MembershipError
from equipoise.models.loading import load_model
from equipoise.placement import Placement
from tests.elastic.services import (
    WAIT_S,
    HoldingLauncher,
    list_serving,
    serving,
    streaming,
    wait_until,
)

# The first of a worker waits until all that ranks need is loaded.
pytestmark = pytest.mark.timeout(400)

LONG = SamplingParams(max_new_tokens=40, ignore_end=True)


@pytest.fixture(scope="module")
def launcher() -> HoldingLauncher:
    return HoldingLauncher()


@pytest.fixture(scope="module")
def controller(launcher: HoldingLauncher) -> Iterator[Controller]:
    with serving(2, launcher, queue_limit=24) as one:
        yield one


def ask_for(controller: Controller, key: str, sampling: SamplingParams = LONG) -> Any:
    """The events of one request, as they come."""
    events: queue.Queue[Any] = queue.Queue()
    controller.submit(ServiceRequest(key, (10, 11, 12), sampling), events.put)
    return events


def read_end(events: Any) -> tuple[list[int], str]:
    tokens: list[int] = []
    while True:
        event = events.get(timeout=WAIT_S)
        if isinstance(event, RequestFailed):
            return tokens, event.reason
        assert event.position == len(tokens)
        tokens += event.tokens
        if event.finish_reason is not None:
            return tokens, event.finish_reason


def test_requests_are_answered_as_the_plain_model_would(controller: Controller) -> None:
    with streaming(controller):
        wait_until(lambda: all(rank.running for rank in controller.status().ranks))
    status = controller.status()
    assert status.ready
    assert [rank.number for rank in status.ranks] == [0, 1]
    assert status.totals.finished == status.totals.submitted >= 20
    assert status.totals.generated_tokens == 6 * status.totals.finished
    assert (status.queue_length, status.running, status.totals.failed) == (0, 0, 0)
    assert json.loads(json.dumps(status.to_json()))["phase"] == "idle"
    assert Placement.from_json(json.dumps(controller.placement())).topology.num_ranks == 2


def test_a_request_is_ended_by_its_client(controller: Controller) -> None:
    events = ask_for(controller, "long")
    first = events.get(timeout=WAIT_S)
    assert len(first.tokens) == 1
    controller.cancel("long")
    controller.cancel("unknown")
    while first.finish_reason is None:
        first = events.get(timeout=WAIT_S)
    assert first.finish_reason in ("cancelled", "length")
    assert ask_for(controller, "long", SamplingParams(max_new_tokens=1)).get(timeout=WAIT_S)


def test_what_cannot_be_served_is_refused_at_once(controller: Controller) -> None:
    def submit(tokens: tuple[int, ...], new: int = 4) -> None:
        controller.submit(ServiceRequest("bad", tokens, SamplingParams(new)), print)

    with pytest.raises(ConfigError, match="is empty"):
        submit(())
    with pytest.raises(ConfigError, match="has 62 tokens and asks for 4 more: 64 are served"):
        submit((1,) * 62)
    with pytest.raises(ConfigError, match="token 384: tokens are 0 to 383"):
        submit((1, 384))
    with pytest.raises(ConfigError, match="at least 1 rank must serve, got 0"):
        controller.scale(to=0)
    with pytest.raises(ConfigError, match="say either"):
        controller.scale()
    with pytest.raises(ConfigError, match=r"rank-9 does not serve: there are rank-0, rank-1"):
        controller.scale(remove=["rank-9"])
    with pytest.raises(ConfigError, match="all ranks would leave"):
        controller.scale(remove=["rank-0", "rank-1"])


def test_a_full_queue_says_so(controller: Controller) -> None:
    asked: list[Any] = []

    def ask_for_ever() -> None:
        while len(asked) < 1000:
            asked.append(ask_for(controller, f"many-{len(asked)}"))

    with pytest.raises(QueueFull, match="24 requests wait already"):
        ask_for_ever()
    assert len(asked) >= 24
    for number, events in enumerate(asked):
        controller.cancel(f"many-{number}")
        assert read_end(events)[1] in ("cancelled", "length")


def test_texts_are_as_likely_as_to_the_plain_model(controller: Controller) -> None:
    texts = [tuple(range(5, 5 + length)) for length in (2, 30, 9)]
    plain = load_model(model_directory(), torch.float32, torch.device("cpu"))
    wanted = []
    for text in texts:
        tokens = torch.tensor([text])
        with torch.inference_mode():
            logits = plain(input_ids=tokens, use_cache=False).logits[0, :-1]
        wanted.append(float(cross_entropy(logits, tokens[0, 1:])))
    assert controller.score(texts, WAIT_S) == pytest.approx(wanted, rel=1e-5)
    assert controller.score(texts[:1], WAIT_S) == pytest.approx(wanted[:1], rel=1e-5)


def test_ranks_come_and_go_while_requests_are_served(
    controller: Controller, launcher: HoldingLauncher
) -> None:
    with streaming(controller):
        wait_until(lambda: all(rank.step_s > 0 for rank in controller.status().ranks))
        rehearsal = controller.scale(to=3, dry_run=True)
        assert (rehearsal.dry_run, rehearsal.done, rehearsal.joining) == (True, False, ("rank-2",))
        assert rehearsal.peak_bytes_per_rank is not None
        assert set(rehearsal.peak_bytes_per_rank) == {"rank-0", "rank-1", "rank-2"}
        # Beside what a switch takes, the first step behind it.
        assert rehearsal.pause_s is not None
        assert rehearsal.pause_s > 2e-3
        assert list_serving(controller) == ["rank-0", "rank-1"]

        up = controller.scale(to=3, timeout_s=WAIT_S)
        assert (up.done, up.joining, up.staying) == (True, ("rank-2",), ("rank-0", "rank-1"))
        assert up.bytes == rehearsal.bytes > 0
        assert list_serving(controller) == ["rank-0", "rank-1", "rank-2"]
        wait_until(lambda: all(rank.running for rank in controller.status().ranks))

        down = controller.scale(remove=["rank-0"], timeout_s=WAIT_S)
        assert (down.leaving, down.generation) == (("rank-0",), up.generation + 1)
        assert list_serving(controller) == ["rank-1", "rank-2"]
        # It ends with 0: any other end would be told as a death.
        wait_until(lambda: [one.name for one in controller.status().ranks] == ["rank-1", "rank-2"])
        controller.rebalance()
        # A name comes back, as another rank; not before it was seen that it is waited for.
        launcher.held.add("rank-0")
        waiting = controller.scale(to=3, wait=False)
        assert (waiting.done, waiting.joining) == (False, ("rank-0",))
        with pytest.raises(MembershipError, match="a change is under way"):
            controller.scale(to=5, busy="refuse")
        launcher.let_go()
        # Behind the one that is under way.
        assert controller.scale(to=2, timeout_s=WAIT_S).leaving == ("rank-2",)
        assert list_serving(controller) == ["rank-0", "rank-1"]
    totals = controller.status().totals
    assert (totals.scalings, totals.deaths, totals.recoveries) == (4, 0, 0)
    wait_until(lambda: controller.status().totals.rebalances > 0 or _work(controller))


def _work(controller: Controller) -> bool:
    """Give ranks load to balance; False."""
    read_end(ask_for(controller, "work", SamplingParams(max_new_tokens=30, ignore_end=True)))
    return False


def test_commands_reach_it_by_its_socket(controller: Controller, tmp_path: Path) -> None:
    path = tmp_path / "service.sock"
    control = ControlSocket(controller, path)
    try:
        assert path.stat().st_mode & 0o777 == 0o600
        status = ask(path, "status")
        assert [rank["name"] for rank in status["ranks"]] == ["rank-0", "rank-1"]
        report = ask(path, "scale", takes_s=WAIT_S, to=4, dry_run=True)
        assert report["joining"] == ["rank-2", "rank-3"]
        assert ask(path, "rebalance") is None
        # A rebalance may come between the two.
        wait_until(lambda: ask(path, "placement") == controller.placement())
        with pytest.raises(ConfigError, match="at least 1 rank must serve"):
            ask(path, "scale", to=0)
        with pytest.raises(ConfigError, match="cannot be asked 'explode': ask one of status"):
            ask(path, "explode")
        with pytest.raises(ConfigError, match="unexpected keyword"):
            ask(path, "scale", two=2)
        with pytest.raises(ConfigError, match="a running service answers there"):
            ControlSocket(controller, path)
    finally:
        control.close()
    with pytest.raises(MembershipError, match="the service does not answer"):
        ask(path, "status")
    # What a process that was killed leaves is in nobody's way.
    path.touch()
    with pytest.raises(ConfigError, match="is no socket"):
        ControlSocket(controller, path)


def test_it_drains_and_then_takes_no_more() -> None:
    with serving(1, config=EPLBConfig(use_async=False)) as controller:
        events = ask_for(controller, "last", SamplingParams(max_new_tokens=20, ignore_end=True))
        wait_until(lambda: controller.status().totals.generated_tokens > 0)
        controller.rebalance()
        # Between two steps, and told all the same.
        wait_until(lambda: controller.status().totals.rebalances == 1)
        assert controller.drain(WAIT_S)
        assert len(read_end(events)[0]) == 20
        with pytest.raises(ServiceClosed, match="it drains"):
            ask_for(controller, "late")
        controller.close()
        assert not controller.status().ready


def test_requests_that_a_close_cuts_off_are_told() -> None:
    with serving(1) as controller:
        # More than a rank answers while this thread has to wait for its turn.
        sampling = SamplingParams(max_new_tokens=60, ignore_end=True)
        asked = [ask_for(controller, f"cut-{number}", sampling) for number in range(60)]
        wait_until(lambda: controller.status().totals.generated_tokens > 0)
        controller.close()
        ends = [read_end(events)[1] for events in asked]
    assert set(ends) <= {"it was closed", "length"}
    assert "it was closed" in ends
