"""Places that processes of torchrun's keep: ranks start and die in them, as many as there are."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from torch.distributed import HashStore

from equipoise.elastic.launcher import RankHandle, RankSeat
from equipoise.errors import ConfigError, MembershipError
from equipoise.launch.keeper import Keeper
from equipoise.launch.torchrun_ranks import (
    TorchrunLauncher,
    find_launcher,
    find_master_address,
    find_node,
)

WAITS = [sys.executable, "-c", "import sys; sys.stdin.read()"]
DEADLINE_S = 60.0


class _Process:
    """A process that stands for a rank: it waits until it is ended."""

    detail = ""

    def __init__(self) -> None:
        self._process = subprocess.Popen(WAITS, stdin=subprocess.PIPE)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    def stop(self, *, kill: bool = False) -> None:
        self._process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)

    def wait(self, timeout_s: float) -> int | None:
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def finish(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()


class _Processes:
    """Starts them."""

    host = "localhost"

    def __init__(self) -> None:
        self.started: list[tuple[RankSeat, _Process]] = []

    def open(self, timeout_s: float) -> None:
        pass

    def find_device(self, taken: list[str]) -> str:
        return "cpu"

    def start(self, seat: RankSeat) -> RankHandle:
        self.started.append((seat, _Process()))
        return self.started[-1][1]

    def adopt(self, seat: RankSeat, pid: int) -> RankHandle:
        raise MembershipError("never")

    def close(self) -> None:
        for _, process in self.started:
            if process.exit_code is None:
                process.stop(kill=True)
            process.wait(DEADLINE_S)
            process.finish()


class _Job:
    """A launcher with its keepers, each in a thread."""

    def __init__(self, size: int) -> None:
        self.store = HashStore()
        self.launcher = TorchrunLauncher(size, "127.0.0.1", self.store)
        self.local = [_Processes() for _ in range(size)]
        self.codes: dict[int, int] = {}
        self.threads = [threading.Thread(target=self._keep, args=(n,)) for n in range(size)]

    def _keep(self, rank: int) -> None:
        address, token = find_launcher(self.store, DEADLINE_S)
        keeper = Keeper(rank, f"node-{rank}", f"cuda:{rank}", self.local[rank])
        self.codes[rank] = keeper.run(address, token, DEADLINE_S)


@contextmanager
def run_job(size: int) -> Iterator[_Job]:
    job = _Job(size)
    for thread in job.threads:
        thread.start()
    try:
        job.launcher.open(DEADLINE_S)
        yield job
    finally:
        job.launcher.close()
        for thread in job.threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()


def make_seat(number: int) -> RankSeat:
    return RankSeat(f"rank-{number}", f"incarnation-{number}", "127.0.0.1", 1, "token")


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_each_process_keeps_one_rank_and_says_how_it_ended() -> None:
    with run_job(2) as job:
        first, second = (job.launcher.start(make_seat(number)) for number in range(2))
        wait_until(lambda: None not in (first.pid, second.pid))
        seats = [one.started[0][0] for one in job.local]
        assert [(seat.node, seat.device) for seat in seats] == [
            ("node-0", "cuda:0"),
            ("node-1", "cuda:1"),
        ]
        with pytest.raises(MembershipError, match="torchrun started 2 processes, and each has its"):
            job.launcher.start(make_seat(2))
        second.stop(kill=True)
        assert second.wait(DEADLINE_S) == -signal.SIGKILL
        assert first.exit_code is None
        # Its place is free again.
        third = job.launcher.start(make_seat(3))
        wait_until(lambda: len(job.local[1].started) == 2)
        job.local[1].started[1][1].finish()
        assert third.wait(DEADLINE_S) == 0
        first.stop()
        assert first.wait(DEADLINE_S) == -signal.SIGTERM
        with pytest.raises(MembershipError, match="ended with the job that it was of"):
            job.launcher.adopt(make_seat(0), 1)
    assert job.codes == {0: 0, 1: 0}


def test_a_keeper_that_is_gone_takes_its_rank_along() -> None:
    with run_job(2) as job:
        rank = job.launcher.start(make_seat(0))
        wait_until(lambda: rank.pid is not None)
        job.launcher._channels[0].close()
        assert rank.wait(DEADLINE_S) == -signal.SIGKILL
    assert job.codes == {0: 1, 1: 0}


def test_who_does_not_come_is_named() -> None:
    launcher = TorchrunLauncher(2, "127.0.0.1", HashStore())
    with pytest.raises(
        MembershipError, match=r"process 0, 1 of torchrun is not there after 0\.1 s"
    ):
        launcher.open(0.1)
    launcher.close("the port is taken")
    with pytest.raises(MembershipError, match="no rank is started any more: the port is taken"):
        launcher.open(DEADLINE_S)


def test_a_first_process_that_never_speaks_is_told() -> None:
    with pytest.raises(MembershipError, match=r"did not say where it listens within 0\.1 s"):
        find_launcher(HashStore(), 0.1)


def test_nodes_and_addresses_come_from_the_environment() -> None:
    assert find_node({"GROUP_RANK": "3"}) == "node-3"
    assert find_node({})
    assert find_master_address({"MASTER_ADDR": "127.0.0.1"}) == "127.0.0.1"
    with pytest.raises(ConfigError, match=r"MASTER_ADDR no\.such\.host\.invalid: .*--interface"):
        find_master_address({"MASTER_ADDR": "no.such.host.invalid"})
