"""Ranks as processes of this machine: what they say arrives, and none outlives its job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import pytest
import torch

from equipoise.comm.groups import RankGroup
from equipoise.config import EPLBConfig
from equipoise.errors import ConfigError, TransferError
from equipoise.job.records import Emit, PhaseRecord, Record
from equipoise.job.spec import JobSpec
from equipoise.launch.failure import (
    Cause,
    JobFailed,
    describe_death,
    describe_error,
    find_first,
)
from equipoise.launch.local import run_local
from equipoise.launch.seats import assign_local_seats, describe_seats

ROOT = Path(__file__).parent.parent
PATIENCE_S = 60.0
"""Until a process has ended that is to end, and would else pause for good."""
PHASES: tuple[Literal["off", "on", "loss", "check"], ...] = ("off", "on", "loss", "check")


def make_spec(num_ranks: int, folder: Path, timeout_s: float = 20.0) -> JobSpec:
    return JobSpec(
        model=folder,
        prompts=(),
        held_out=(),
        num_ranks=num_ranks,
        config=EPLBConfig(),
        timeout_s=timeout_s,
    )


def run(job: str, num_ranks: int, folder: Path, timeout_s: float = 20.0) -> list[Record]:
    heard: list[Record] = []
    spec = make_spec(num_ranks, folder, timeout_s)
    run_local(
        spec, assign_local_seats(num_ranks, "cpu"), heard.append, job=f"tests.test_launch:{job}"
    )
    return heard


def meet_and_tell(spec: JobSpec, group: RankGroup, emit: Emit) -> None:
    ranks = torch.tensor([group.rank])
    group.all_reduce(ranks)
    (spec.model / f"rank-{group.rank}").write_text(f"{ranks.item()} {os.getpid()}")
    if group.rank == 0:
        emit(PhaseRecord("off"))
        emit(PhaseRecord("on"))


def refuse_on_one(spec: JobSpec, group: RankGroup, emit: Emit) -> None:
    if group.rank == 1:
        raise ConfigError("the model is too small:\n ask for a larger one")
    group.barrier()


def break_on_two(spec: JobSpec, group: RankGroup, emit: Emit) -> None:
    if group.rank == 2:
        raise ZeroDivisionError("no tokens\nat all")
    group.barrier()


def note_time(spec: JobSpec) -> None:
    """One clock for all processes of a machine."""
    (spec.model / "ended-at").write_text(str(time.monotonic()))


def die_on_two(spec: JobSpec, group: RankGroup, emit: Emit) -> None:
    if group.rank == 2:
        note_time(spec)
        os.kill(os.getpid(), signal.SIGKILL)
    group.barrier()


def leave_on_one(spec: JobSpec, group: RankGroup, emit: Emit) -> None:
    if group.rank == 1:
        note_time(spec)
        os._exit(7)
    group.barrier()


def linger_on_one(spec: JobSpec, group: RankGroup, emit: Emit) -> None:
    # Rank 0 shall not be gone before rank 1 has its group.
    group.barrier()
    if group.rank == 1:
        signal.pause()


def tell_and_hang(spec: JobSpec, group: RankGroup, emit: Emit) -> None:
    (spec.model / f"pid-{group.rank}").write_text(str(os.getpid()))
    group.barrier()
    if group.rank == 0:
        emit(PhaseRecord("on"))
    signal.pause()


def tell_before_one_dies(spec: JobSpec, group: RankGroup, emit: Emit) -> None:
    (spec.model / f"pid-{group.rank}").write_text(str(os.getpid()))
    group.barrier()
    if group.rank == 0:
        for phase in PHASES:
            emit(PhaseRecord(phase))
    group.barrier()
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def test_ranks_meet_and_rank_0_is_heard_in_order(tmp_path: Path) -> None:
    assert run("meet_and_tell", 3, tmp_path) == [PhaseRecord("off"), PhaseRecord("on")]
    said = [(tmp_path / f"rank-{rank}").read_text().split() for rank in range(3)]
    assert [total for total, _ in said] == ["3", "3", "3"]
    assert len({pid for _, pid in said} | {str(os.getpid())}) == 4


def test_an_error_on_purpose_is_one_line_that_names_the_rank(tmp_path: Path) -> None:
    with pytest.raises(JobFailed) as caught:
        run("refuse_on_one", 3, tmp_path)
    assert str(caught.value) == "rank 1: the model is too small: ask for a larger one"
    assert caught.value.failure.expected


def test_an_unexpected_error_comes_with_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(JobFailed) as caught:
        run("break_on_two", 3, tmp_path)
    assert str(caught.value) == "rank 2 failed: ZeroDivisionError: no tokens"
    assert not caught.value.failure.expected
    assert "in break_on_two" in caught.value.failure.traceback


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ("die_on_two", "rank 2 was killed by SIGKILL"),
        ("leave_on_one", "rank 1 ended with exit code 7 before the job was done"),
    ],
)
def test_a_dead_rank_is_named_and_not_those_who_missed_it(
    tmp_path: Path, job: str, message: str
) -> None:
    with pytest.raises(JobFailed) as caught:
        run(job, 4, tmp_path)
    took = time.monotonic() - float((tmp_path / "ended-at").read_text())
    assert str(caught.value) == message
    assert not caught.value.failure.expected
    assert took < 15, "the deadline of those who missed it is 20 s"


def test_what_was_said_before_a_death_is_heard(tmp_path: Path) -> None:
    heard: list[Record] = []

    def emit(record: Record) -> None:
        if not heard:
            # Meanwhile all of it is said, and a rank dies.
            wait_until_gone(tmp_path, [1])
        heard.append(record)

    seats = assign_local_seats(2, "cpu")
    with pytest.raises(JobFailed, match="rank 1 was killed by SIGKILL"):
        run_local(make_spec(2, tmp_path), seats, emit, job="tests.test_launch:tell_before_one_dies")
    assert heard == [PhaseRecord(phase) for phase in PHASES]


def test_a_rank_that_never_ends_is_named(tmp_path: Path) -> None:
    # Within which ranks must have met, too.
    with pytest.raises(JobFailed, match=r"^rank 1 still runs 10 s after rank 0 was done$"):
        run("linger_on_one", 2, tmp_path, timeout_s=10.0)


def test_an_error_of_the_display_leaves_no_rank(tmp_path: Path) -> None:
    def emit(record: Record) -> None:
        raise OSError("the disk is full")

    spec = make_spec(2, tmp_path)
    with pytest.raises(OSError, match="the disk is full"):
        run_local(spec, assign_local_seats(2, "cpu"), emit, job="tests.test_launch:tell_and_hang")
    wait_until_gone(tmp_path, range(2))


PARENT = """
import signal, sys
from pathlib import Path
from equipoise.launch.local import run_local
from equipoise.launch.seats import assign_local_seats
from tests.test_launch import make_spec

def terminated(number, frame):
    raise SystemExit(143)

signal.signal(signal.SIGTERM, terminated)
spec = make_spec(3, Path(sys.argv[1]))
emit = lambda record: print("serving", flush=True)
try:
    run_local(spec, assign_local_seats(3, "cpu"), emit, job="tests.test_launch:tell_and_hang")
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_no_rank_outlives_its_parent(tmp_path: Path, number: signal.Signals, status: int) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "serving\n"
        if number is signal.SIGINT:
            os.killpg(parent.pid, number)  # as a terminal does
        else:
            parent.send_signal(number)
        _, errors = parent.communicate(timeout=PATIENCE_S)
        assert parent.returncode == status
        assert errors == ""
        wait_until_gone(tmp_path, range(3))
    finally:
        parent.kill()
        parent.wait()


def wait_until_gone(folder: Path, ranks: Iterable[int]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    for rank in ranks:
        pid = int((folder / f"pid-{rank}").read_text())
        while is_alive(pid):
            assert time.monotonic() < deadline, f"rank {rank} still runs"
            os.sched_yield()


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # the latter between its opening and reading
        return False
    return state != "Z"


def test_the_first_cause_is_a_death_then_an_error_then_a_lost_peer() -> None:
    lost = describe_error(0, TransferError("rank 0: rank 2 is gone"))
    raised = describe_error(1, ValueError("x"))
    died = describe_death(2, -11)
    assert lost.cause is Cause.LOST_A_PEER
    assert find_first([lost, raised, died]) is died
    assert find_first([lost, raised]) is raised
    assert died.text == "rank 2 was killed by SIGSEGV"
    assert lost.text == "rank 0: rank 2 is gone"


def test_seats_on_the_cpu() -> None:
    seats = assign_local_seats(2, "cpu")
    assert [seat.device for seat in seats] == ["cpu", "cpu"]
    assert describe_seats(seats) == "2 ranks on the CPU; tokens travel by gloo"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="torch sees no CUDA device here; use --device cpu"):
        assign_local_seats(2, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_ranks_beyond_the_gpus_share_them_over_gloo() -> None:
    num_gpus = torch.cuda.device_count()
    shared = assign_local_seats(num_gpus + 1, "cuda")
    assert (shared[0].device, shared[-1].device) == ("cuda:0", "cuda:0")
    assert shared[0].device_group == "gloo"
    assert assign_local_seats(num_gpus, "cuda")[0].device_group == "nccl"
