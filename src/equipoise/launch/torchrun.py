"""A job whose ranks torchrun has started: this process is one of them."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from equipoise.engine.records import Emit
from equipoise.engine.spec import JobSpec
from equipoise.errors import ConfigError, MembershipError
from equipoise.launch.failure import JobFailed, describe_error
from equipoise.launch.local import ENGINE_JOB
from equipoise.launch.seats import Seat

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_CLAIM_S = 5.0


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


class SilentFailure(Exception):  # noqa: N818 - as JobFailed
    """This rank has failed, and another one says why.

    Attributes:
        expected: as in `Failure`.
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
    return TorchrunRank(
        rank=rank,
        size=size,
        local_rank=_read_number({"LOCAL_RANK": str(rank), **environment}, "LOCAL_RANK", 0),
        local_size=_read_number(
            {"LOCAL_WORLD_SIZE": str(size), **environment}, "LOCAL_WORLD_SIZE", 1
        ),
    )


def run_torchrun(spec: JobSpec, seat: Seat, emit: Emit, *, job: str = ENGINE_JOB) -> None:
    """Run a job as one rank of it, and return when this rank is done.

    Args:
        spec: the same on every rank.
        seat: of this rank.
        emit: called with each record on rank 0, never on others.
        job: as `run_local`.
    Collective: every rank that torchrun started.
    Raises: JobFailed on the rank that was first to fail; SilentFailure on those that follow.
    """
    # The launcher ends its ranks by signals, also while one waits inside torch for another.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    from torch.distributed import rendezvous  # type: ignore[attr-defined]

    from equipoise.launch.rank_process import take_seat

    timeout = timedelta(seconds=spec.timeout_s)
    try:
        store, _, _ = next(iter(rendezvous("env://", seat.rank, seat.size, timeout=timeout)))
    except (RuntimeError, ValueError) as error:
        raise MembershipError(
            f"rank {seat.rank}: no store at MASTER_ADDR, MASTER_PORT: {error}"
        ) from error
    try:
        take_seat(job, spec, seat, store, emit)
    except Exception as error:
        failure = describe_error(seat.rank, error)
        if _is_first(store, failure.text):
            raise JobFailed(failure) from error
        raise SilentFailure(failure.expected) from error


def _is_first(store: object, text: str) -> bool:
    """Whether this rank is the one that says what went wrong; yes, if nobody can be asked."""
    answers: list[bytes] = []

    def ask() -> None:
        with contextlib.suppress(RuntimeError):
            answers.append(store.compare_set("equipoise/failure", "", text))  # type: ignore[attr-defined]

    # A store's client may block beyond its own timeout, hence a thread that can be given up.
    thread = threading.Thread(target=ask, name="equipoise-store", daemon=True)
    thread.start()
    thread.join(_CLAIM_S)
    return not answers or answers[0].decode() == text


def _read_number(environment: Mapping[str, str], name: str, least: int) -> int:
    text = environment[name]
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"environment: {name}={text!r} is not a whole number from {least} up")
    return int(text)
