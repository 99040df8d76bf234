"""Hosts whose links drop and are restored: to the controller and its store, to peers, to both."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from equipoise.elastic.controller import Controller
from tests.faults.answers import AnswerStream
from tests.faults.hosts import HostLauncher, Hosts, Link, find_obstacle, open_hosts
from tests.faults.small_service import PATIENCE_S, SILENCE_S, make_service

pytestmark = [pytest.mark.more_faults, pytest.mark.timeout(600)]

NO_SIGN = f"gave no sign of life for {SILENCE_S:g} s"


@pytest.fixture(autouse=True)
def namespaces() -> None:
    obstacle = find_obstacle()
    if obstacle is not None:
        pytest.skip(obstacle)


@dataclass(frozen=True)
class CutOff:
    """A host whose links drop.

    Attributes:
        links: which.
        host: whose.
        seconds: how long; None for until its rank was given up.
        why: words of the reason that it was given up for; empty if it is not to be.
    """

    links: tuple[Link, ...]
    host: int
    seconds: float | None
    why: str = ""

    def __str__(self) -> str:
        how_long = f"{self.seconds:g}s" if self.seconds else "long"
        return f"{'+'.join(self.links)}-{self.host}-{how_long}"


CASES = (
    CutOff(("controller",), 1, 1.0),
    CutOff(("peers",), 1, 1.0),
    CutOff(("controller",), 1, None, NO_SIGN),
    CutOff(("controller",), 0, None, NO_SIGN),
    CutOff(("peers",), 1, None, "its peers do not reach it"),
    CutOff(("peers",), 0, None, "its peers do not reach it"),
    CutOff(("controller", "peers"), 2, None, NO_SIGN),
    CutOff(("controller", "peers"), 0, 1.0),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_host_that_is_cut_off_costs_nobody_an_answer(tmp_path: Path, case: CutOff) -> None:
    with open_hosts(3) as hosts:
        # What is restored soon must have time to be heard again, whatever else this machine does.
        silence_s = SILENCE_S if case.seconds is None else 5 * SILENCE_S
        spec, answers = make_service(
            tmp_path,
            "torch_gloo",
            timeout_s=2 * SILENCE_S,
            silence_s=silence_s,
            respawn_s=0.5,
            interface=hosts.address,
        )
        launcher = HostLauncher(hosts, tmp_path)
        controller = Controller(spec, launcher)
        controller.start(PATIENCE_S)
        try:
            stream = AnswerStream(controller, answers, 8)
            assert stream.wait_for(16, PATIENCE_S), stream.faults
            _cut_off(case, hosts, launcher, controller, stream)
            assert stream.wait_for(16, PATIENCE_S), stream.faults
            assert stream.end(PATIENCE_S), stream.faults
        finally:
            for rank in launcher.ranks.values():
                rank.is_far = False
            controller.close()


def _cut_off(
    case: CutOff,
    hosts: Hosts,
    launcher: HostLauncher,
    controller: Controller,
    stream: AnswerStream,
) -> None:
    name = f"rank-{case.host}"
    record = controller._roster.find(name)
    assert record is not None
    rank = launcher.ranks[name]
    rank.is_far = "controller" in case.links
    for link in case.links:
        hosts.set_link(case.host, link, "down")
    if case.seconds is not None:
        time.sleep(case.seconds)
    else:
        _wait(lambda: record.state == "dead")
        assert case.why in record.detail
        # The others serve on while it is cut off.
        assert stream.wait_for(16, PATIENCE_S), stream.faults
    for link in case.links:
        hosts.set_link(case.host, link, "up")
    if case.seconds is None:
        # It finds that it was given up, or was ended where it could be reached.
        _wait(lambda: rank.handle.exit_code is not None)
    rank.is_far = False
    _wait(lambda: _is_whole(controller))
    assert (controller.status().totals.deaths > 0) == (case.seconds is None)


def _is_whole(controller: Controller) -> bool:
    status = controller.status()
    serving = [one for one in status.ranks if one.state == "serving" and one.number is not None]
    return len(serving) == 3 and status.phase == "idle"


def _wait(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < until, "it did not come to be"
        time.sleep(0.02)
