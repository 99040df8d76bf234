"""A job whose ranks torchrun has started: this process is one of them."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from equipoise.errors import ConfigError, EquipoiseError
from equipoise.job.records import Emit
from equipoise.job.spec import JobSpec
from equipoise.launch.failure import Cause, Failure, describe_error
from equipoise.launch.local import ENGINE_JOB, GRACE_S
from equipoise.launch.seats import assign_seat

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")
"""What ranks are asked to run."""

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class TorchrunRank:
    """What torchrun says of this process.

    Attributes:
        rank: its number in the job.
        size: R.
        local_rank: its number on this machine.
        local_size: ranks on this machine.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int


class RankEnded(Exception):  # noqa: N818 - says what happened
    """This rank has ended before its job was done, and a rank has said why.

    Attributes:
        expected: whether this rank raised an EquipoiseError.
    """

    def __init__(self, expected: bool) -> None:
        super().__init__()
        self.expected = expected


def read_torchrun(environment: Mapping[str, str]) -> TorchrunRank | None:
    """Find out whether torchrun, or another launcher of env:// jobs, started this process.

    Args:
        environment: of the process.
    Returns:
        This process's rank, None where none of the variables is set that say so.
    Collective: none.
    Raises: ConfigError if some of them are missing or not numbers.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return None
    missing = [name for name in _NEEDED if name not in environment]
    if missing:
        raise ConfigError(
            f"environment: {', '.join(missing)} not set beside RANK or WORLD_SIZE: start with "
            "torchrun, or unset RANK and WORLD_SIZE to start ranks on this machine"
        )
    rank, size = _read_number(environment, "RANK", 0), _read_number(environment, "WORLD_SIZE", 1)
    if rank >= size:
        raise ConfigError(f"environment: RANK={rank} is not one of WORLD_SIZE={size} ranks")
    _read_number(environment, "MASTER_PORT", 1)
    return TorchrunRank(
        rank=rank,
        size=size,
        local_rank=_read_number({"LOCAL_RANK": str(rank), **environment}, "LOCAL_RANK", 0),
        local_size=_read_number(
            {"LOCAL_WORLD_SIZE": str(size), **environment}, "LOCAL_WORLD_SIZE", 1
        ),
    )


def run_torchrun(
    place: TorchrunRank,
    settle: Callable[[], JobSpec],
    emit: Emit,
    tell: Callable[[Failure], None],
    *,
    timeout_s: float,
    job: str = ENGINE_JOB,
) -> None:
    """Run a job as one rank of it, and return when this rank is done.

    Args:
        place: of this rank.
        settle: finds out what to run, which must be the same on every rank, or raises.
        emit: called with each record on rank 0, never on others.
        tell: called with what ended the job, on one rank alone.
        timeout_s: longest wait for the other ranks, until what to run is settled.
        job: as `run_local`.
    Collective: every rank that torchrun started.
    Raises: RankEnded if the job cannot begin, or ends before it is done; MembershipError if this
        rank cannot reach the others to begin with.
    """
    # Late, so that a job on this machine alone does not wait for torch.
    from equipoise.launch.meeting import describe_spec

    spec, store = agree(place, settle, describe_spec, tell, timeout_s=timeout_s)
    _take_part(place, spec, store, emit, tell, job)


def agree(
    place: TorchrunRank,
    settle: Callable[[], T],
    describe: Callable[[T], Mapping[str, str]],
    tell: Callable[[Failure], None],
    *,
    timeout_s: float,
) -> tuple[T, Store]:
    """Meet the other ranks, and see to it that all were asked for the same.

    Args:
        place: of this rank.
        settle: finds out what to run, or raises.
        describe: says of it what must be equal on all ranks, by name.
        tell: called with why it cannot begin, on one rank alone.
        timeout_s: longest wait for the other ranks.
    Returns:
        What to run, and the store of the launcher's job.
    Collective: every rank that torchrun started.
    Raises: as `run_torchrun`.
    """
    # The launcher ends its ranks by signals, also while one waits inside torch for another.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    spec: T | None = None
    problem: EquipoiseError | None = None
    try:
        spec = settle()
    except EquipoiseError as error:
        problem = error
    from equipoise.launch import meeting

    rank, size = place.rank, place.size
    store = meeting.join_store(rank, size, os.environ, timeout_s)
    facts = describe(spec) if spec is not None else {}
    word = meeting.Word(None if problem is None else str(problem), facts)
    refusal = meeting.compare_words(store, rank, size, word, timeout_s)
    if refusal is not None:
        trace = "".join(traceback.format_exception(problem)) if problem else ""
        failure = Failure(rank, Cause.RAISED, refusal.text, expected=True, traceback=trace)
        say = partial(tell, failure) if refusal.speaker == rank else None
        meeting.leave(store, rank, size, say)
        raise RankEnded(expected=True)
    assert spec is not None, "a rank without a spec has a problem, which all have heard of"
    return spec, store


def _take_part(
    place: TorchrunRank,
    spec: JobSpec,
    store: Store,
    emit: Emit,
    tell: Callable[[Failure], None],
    job: str,
) -> None:
    from equipoise.launch import meeting
    from equipoise.launch.rank_process import take_seat

    rank, size = place.rank, place.size
    local = {"local_rank": place.local_rank, "local_size": place.local_size}
    try:
        take_seat(job, spec, assign_seat(rank, size, device=spec.device, **local), store, emit)
    except Exception as error:
        failure = describe_error(rank, error)
        # Who has lost a peer leaves the word to the peer.
        grace_s = GRACE_S if failure.cause is Cause.LOST_A_PEER else 0.0
        speaks = meeting.claim(store, rank, grace_s=grace_s)
        meeting.leave(store, rank, size, partial(tell, failure) if speaks else None)
        raise RankEnded(failure.expected) from error


def _read_number(environment: Mapping[str, str], name: str, least: int) -> int:
    text = environment[name]
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"environment: {name}={text!r} is not a whole number from {least} up")
    return int(text)
