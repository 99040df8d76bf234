"""Ranks that die, hang and fail to come: requests go on, and what happened is named."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from equipoise.elastic.channel import LOOPBACK, ChannelClosed, connect
from equipoise.elastic.controller import Controller
from equipoise.elastic.service import RequestFailed, ServiceClosed, ServiceRequest
from equipoise.elastic.spec import Fault
from equipoise.engine.requests import SamplingParams
from equipoise.errors import ConfigError, MembershipError
from tests.elastic.services import (
    WAIT_S,
    DoomedLauncher,
    find_rank,
    is_alive,
    list_serving,
    serving,
    streaming,
    wait_until,
)

pytestmark = pytest.mark.timeout(400)

ROOT = Path(__file__).parent.parent.parent


def kill(controller: Controller, name: str) -> None:
    pid = find_rank(controller, name).pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


@pytest.mark.more_faults
def test_ranks_die_and_are_replaced_and_nobodys_answer_is_lost() -> None:
    with serving(3, respawn=True) as controller, streaming(controller):
        kill(controller, "rank-0")
        wait_until(lambda: controller.status().totals.recoveries == 1)
        wait_until(lambda: len(list_serving(controller)) == 3)
        # Two at once.
        kill(controller, "rank-0")
        kill(controller, "rank-1")
        wait_until(lambda: controller.status().totals.deaths == 3)
        wait_until(lambda: len(list_serving(controller)) == 3)
    assert controller.status().totals.rerun > 0


def test_a_death_is_named_and_survivors_go_on() -> None:
    with serving(2) as controller, streaming(controller):
        kill(controller, "rank-1")
        wait_until(lambda: controller.status().totals.recoveries == 1)
        dead = find_rank(controller, "rank-1")
        assert (dead.state, dead.number) == ("dead", None)
        assert dead.detail == "rank-1 was killed by SIGKILL"
        assert list_serving(controller) == ["rank-0"]


def test_a_newcomer_that_dies_leaves_the_others_serving() -> None:
    launcher = DoomedLauncher("rank-2")
    with serving(1, launcher) as controller, streaming(controller):
        with pytest.raises(MembershipError, match="rank-2 was killed by SIGKILL; the others serve"):
            controller.scale(to=3, timeout_s=WAIT_S)
        status = controller.status()
        assert (status.phase, status.ready, status.generation) == ("failed", True, 0)
        assert "rank-2 was killed by SIGKILL" in status.reason
        assert list_serving(controller) == ["rank-0"]
        launcher.doomed.clear()
        assert controller.scale(to=2, timeout_s=WAIT_S).done
        assert controller.status().phase == "idle"


def test_a_size_that_cannot_hold_all_experts_is_refused_with_the_least_that_can() -> None:
    with serving(2, slots_per_rank=16) as controller, streaming(controller):
        with pytest.raises(MembershipError, match="at least 2 ranks can"):
            controller.scale(to=1, timeout_s=WAIT_S)
        assert list_serving(controller) == ["rank-0", "rank-1"]
        # After a death as well: it says so and ends, and every request is told.
        failed: queue.Queue[Any] = queue.Queue()
    with serving(2, slots_per_rank=16) as controller:
        sampling = SamplingParams(max_new_tokens=50, ignore_end=True)
        for number in range(6):
            controller.submit(ServiceRequest(f"r{number}", (5, 6), sampling), failed.put)
        kill(controller, "rank-0")
        wait_until(lambda: controller.status().phase == "failed")
        assert "at least 2 ranks can" in controller.status().reason
        with pytest.raises(ServiceClosed, match="at least 2 ranks can"):
            controller.submit(ServiceRequest("late", (5, 6), sampling), failed.put)
        ends = 0
        while ends < 6:
            event = failed.get(timeout=WAIT_S)
            if isinstance(event, RequestFailed):
                assert "at least 2 ranks can" in event.reason
            ends += isinstance(event, RequestFailed) or event.finish_reason is not None


def test_a_rank_that_hangs_is_given_up_by_its_silence() -> None:
    faults = (Fault("rank-1", 12, "hang"),)
    with serving(2, faults=faults, silence_s=6.0) as controller, streaming(controller):
        wait_until(lambda: controller.status().totals.recoveries == 1)
        dead = find_rank(controller, "rank-1")
        assert dead.detail == "rank-1 gave no sign of life for 6 s, and was given up"
        assert dead.pid is not None
        wait_until(lambda pid=dead.pid: not is_alive(pid))


def test_with_no_rank_left_every_request_is_told() -> None:
    with serving(1) as controller:
        heard: queue.Queue[Any] = queue.Queue()
        sampling = SamplingParams(max_new_tokens=60, ignore_end=True)
        for number in range(16):
            controller.submit(ServiceRequest(f"r{number}", (5,), sampling), heard.put)
        heard.get(timeout=WAIT_S)
        kill(controller, "rank-0")
        told, reasons = set(), set()
        while len(told) < 16:
            event = heard.get(timeout=WAIT_S)
            if isinstance(event, RequestFailed):
                reasons.add(event.reason)
                told.add(event.request_id)
            elif event.finish_reason is not None:
                # Answered before the rank died.
                told.add(event.request_id)
        assert reasons == {"no rank is left: rank-0 was killed by SIGKILL"}
        wait_until(lambda: not controller.status().ready)
        with pytest.raises(ServiceClosed, match="no rank is left"):
            controller.scale(to=2)


def test_ranks_that_do_not_come_end_the_start() -> None:
    with pytest.raises(MembershipError, match="rank-1 was killed by SIGKILL"):  # noqa: SIM117
        with serving(2, DoomedLauncher("rank-1")):
            pytest.fail("it serves without rank-1")
    with pytest.raises(ConfigError, match="gives ranks up between two signs of life"):  # noqa: SIM117
        with serving(1, silence_s=0.1):
            pytest.fail("it serves")


@pytest.mark.more_faults
def test_a_link_that_drops_is_taken_up_again_by_nobody_else() -> None:
    with serving(2) as controller, streaming(controller) as stream:
        record = controller._roster.find("rank-1")
        assert record is not None
        seat = record.seat
        for name, incarnation in (("rank-1", "other"), ("rank-7", seat.incarnation)):
            hello = {"token": seat.token, "name": name, "incarnation": incarnation}
            stranger = connect((LOOPBACK, seat.port), hello, peer="the controller")
            assert stranger.receive(WAIT_S) == {"do": "given up"}
            with pytest.raises(ChannelClosed):
                stranger.receive(WAIT_S)
        for _ in range(2):
            channel = record.channel
            assert channel is not None
            channel.close()
            wait_until(lambda old=channel: record.channel not in (None, old))
            stream.wait_for(10, WAIT_S)
        assert controller.status().totals.deaths == 0
        assert controller.scale(to=1, timeout_s=WAIT_S).done


def test_callers_of_a_closed_service_do_not_wait() -> None:
    with serving(1) as controller:
        pass
    with pytest.raises(ServiceClosed):
        controller.scale(to=2)
    with pytest.raises(ServiceClosed):
        controller.rebalance()
    controller.cancel("whatever")
    assert not controller.status().ready


ABANDONED = """
import os, signal, sys, threading
from tests.elastic.services import find_pids, serving, streaming

if __name__ == "__main__":
    with serving(2, orphan_s=2.0) as controller, streaming(controller):
        print(*find_pids(controller), flush=True)
        threading.Event().wait(50)
"""


@pytest.mark.skipif(
    not os.environ.get("EQUIPOISE_FAULTS"), reason="loads all anew: set EQUIPOISE_FAULTS=1"
)
def test_ranks_do_not_outlive_a_controller_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "abandoned.py"
    script.write_text(ABANDONED)
    controller = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
    )
    with controller:
        assert controller.stdout is not None
        pids = [int(pid) for pid in controller.stdout.readline().split()]
        assert len(pids) == 2
        controller.kill()
        wait_until(lambda: not any(map(is_alive, pids)))
