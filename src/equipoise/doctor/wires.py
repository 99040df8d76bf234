"""Every wire, tried between two processes of this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from equipoise.doctor.trial import Chosen, Refused, Said, Stage, Timed, TrialSpec
from equipoise.launch.failure import Cause, JobFailed
from equipoise.launch.local import run_local
from equipoise.launch.seats import assign_local_seats

Memory = Literal["CPU", "GPU"]
Status = Literal["works", "unavailable", "fails", "hangs", "not tried"]

_JOB = "equipoise.doctor.trial:try_wire"
_NUM_BYTES: dict[Memory, int] = {"CPU": 32 << 20, "GPU": 256 << 20}
_NUM_ROUNDS = 5
_OUTPUT_CHARACTERS = 4000


@dataclass(frozen=True)
class WireReport:
    """How a wire did in one kind of memory.

    Attributes:
        communicator: its name, or "auto".
        memory: where the experts were.
        devices: of the two ranks, as torch names them; equal where they share one, empty where
            nothing was tried.
        status: "works"; "unavailable", it says itself that it cannot work here; "fails"; "hangs",
            it gave no answer in time; or "not tried".
        reason: why it does not work, and what to do about it where that is known; None if it does.
        chosen: the communicator that was made, if it came so far; for "auto", what it picked.
        choice: why it is this one.
        num_bytes: that each rank sent and received in a round.
        seconds: of each round, of the slower rank.
        output: the last of what the two processes printed.
    """

    communicator: str
    memory: Memory
    devices: tuple[str, ...]
    status: Status
    reason: str | None = None
    chosen: str | None = None
    choice: str | None = None
    num_bytes: int = 0
    seconds: tuple[float, ...] = ()
    output: str = ""

    @property
    def gb_per_s(self) -> float | None:
        """What one rank receives in a second, while it sends as much; None if nothing travelled."""
        return self.num_bytes / median(self.seconds) / 1e9 if self.seconds else None

    def to_json(self) -> dict[str, Any]:
        """Plain values by name."""
        return {
            "communicator": self.communicator,
            "memory": self.memory,
            "devices": list(self.devices),
            "status": self.status,
            "reason": self.reason,
            "chosen": self.chosen,
            "choice": self.choice,
            "gb_per_s": self.gb_per_s,
            "bytes_per_round": self.num_bytes,
            "seconds_of_rounds": list(self.seconds),
            "output": self.output,
        }


def try_wires(
    names: Sequence[str],
    num_gpus: int,
    no_gpu: str,
    timeout_s: float,
    on_trial: Callable[[str, Memory], None] = lambda _, __: None,
) -> tuple[WireReport, ...]:
    """Try each wire in CPU memory, and in that of GPUs where there are some.

    Args:
        names: of communicators, "auto" for whatever that picks.
        num_gpus: that torch sees here; with one, both ranks share it.
        no_gpu: why there is none, in case.
        timeout_s: longest that one trial may take once its processes were started.
        on_trial: called before each trial.
    Collective: none; starts the ranks of each trial, and leaves none.
    """
    reports = []
    for name in names:
        on_trial(name, "CPU")
        reports.append(_try(name, "CPU", timeout_s))
        if not num_gpus:
            reports.append(WireReport(name, "GPU", (), "not tried", no_gpu))
        else:
            on_trial(name, "GPU")
            reports.append(_try(name, "GPU", timeout_s))
    return tuple(reports)


def _try(name: str, memory: Memory, timeout_s: float) -> WireReport:
    heard: list[Said] = []
    seats = assign_local_seats(2, "cpu" if memory == "CPU" else "cuda")
    with tempfile.TemporaryDirectory(prefix="equipoise-doctor-") as folder:
        output = Path(folder, "output")
        # A wire's own deadline comes first, as it can say whom it waited for.
        spec = TrialSpec(name, _NUM_BYTES[memory], _NUM_ROUNDS, timeout_s / 2, output)
        problem: tuple[Status, str] | None = None
        try:
            run_local(spec, seats, heard.append, job=_JOB, limit_s=timeout_s)
        except TimeoutError:
            problem = "hangs", f"no answer within {timeout_s:g} s, {_say_stage(heard)}"
        except JobFailed as error:
            refusals = [said.reason for said in heard if isinstance(said, Refused)]
            problem = ("unavailable", refusals[0]) if refusals else ("fails", str(error))
            if error.failure.cause is Cause.DIED:
                problem = "fails", f"{error}, {_say_stage(heard)}"
        printed = output.read_text(errors="replace") if output.exists() else ""
    chosen = next((said for said in heard if isinstance(said, Chosen)), None)
    timed = next((said for said in heard if isinstance(said, Timed)), None)
    if problem is None and timed is None:
        problem = "fails", "its processes ended without a figure"
    status, reason = problem or ("works", None)
    return WireReport(
        name,
        memory,
        tuple(seat.device for seat in seats),
        status,
        reason,
        chosen=chosen.name if chosen else None,
        choice=chosen.reason if chosen else None,
        num_bytes=spec.num_bytes if timed else 0,
        seconds=timed.seconds if timed else (),
        output=printed.strip()[-_OUTPUT_CHARACTERS:],
    )


def _say_stage(heard: Sequence[Said]) -> str:
    stages = [said.text for said in heard if isinstance(said, Stage)]
    return f"while {stages[-1]}" if stages else "before its processes had met"
