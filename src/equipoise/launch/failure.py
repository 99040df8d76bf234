"""What ended a job, told by the rank it began with."""

from __future__ import annotations

import signal
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum

from equipoise.errors import EquipoiseError, MembershipError, TransferError


class Cause(IntEnum):
    """How likely a rank's end is what the others' ends follow from; the lowest is shown."""

    DIED = 0
    RAISED = 1
    LOST_A_PEER = 2


@dataclass(frozen=True)
class Failure:
    """How one rank ended a job.

    Attributes:
        rank: its number.
        cause: what to make of it.
        text: one line that names the rank.
        expected: whether it raised an EquipoiseError, whose text says what would be right.
        traceback: of what it raised; empty where the process died.
        at: `time.monotonic()` when it happened; one clock for all processes of a machine.
    """

    rank: int
    cause: Cause
    text: str
    expected: bool
    traceback: str = ""
    at: float = field(default_factory=time.monotonic)


class JobFailed(EquipoiseError):  # noqa: N818 - says what happened
    """A job ended before it was done.

    Attributes:
        failure: the one it began with.
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text)
        self.failure = failure


def describe_error(rank: int, error: BaseException) -> Failure:
    """What a rank says of an exception that it could not handle.

    Args:
        rank: that raised it.
        error: what it raised.
    Collective: none.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    expected = isinstance(error, EquipoiseError)
    if expected:
        text = " ".join(lines)
        # Errors of groups and wires name the rank already.
        if not text.startswith(tuple(f"rank {rank}{mark}" for mark in " :,")):
            text = f"rank {rank}: {text}"
    else:
        # torch appends its C++ stack; the first line is what happened.
        text = f"rank {rank} failed: {': '.join([type(error).__name__, *lines[:1]])}"
    lost_a_peer = isinstance(error, TransferError | MembershipError)
    return Failure(
        rank=rank,
        cause=Cause.LOST_A_PEER if lost_a_peer else Cause.RAISED,
        text=text,
        expected=expected,
        traceback="".join(traceback.format_exception(error)),
    )


def describe_death(rank: int, exit_code: int | None) -> Failure:
    """What to say of a rank whose process ended without a word.

    Args:
        rank: of the process.
        exit_code: negative for a signal, None where it is not known.
    Collective: none.
    """
    if exit_code is not None and exit_code < 0:
        how = f"was killed by {_name_signal(-exit_code)}"
    else:
        how = f"ended with exit code {exit_code} before the job was done"
    return Failure(rank, Cause.DIED, f"rank {rank} {how}", expected=False)


def find_first(failures: Iterable[Failure]) -> Failure:
    """The failure that the others follow from: a death, then an error, then a lost peer.

    Collective: none.
    """
    return min(failures, key=lambda failure: (failure.cause, failure.at))


def _name_signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
