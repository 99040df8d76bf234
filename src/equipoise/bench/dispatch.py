"""Dispatch and combine, each beside what it is to be compared with, in one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Literal

from equipoise.bench.dispatch_case import (
    DispatchCase,
    DispatchLeftOut,
    DispatchMeasured,
    DispatchSaid,
    DispatchSpec,
    Peer,
)
from equipoise.bench.outcome import BenchOutcome, Row, with_goal
from equipoise.launch.failure import JobFailed
from equipoise.launch.local import run_local
from equipoise.launch.seats import assign_local_seats

GOALS: dict[Peer, float] = {"transformers' all_to_all": 0.7, "bare kernels": 1.05}
"""The most that ours should take, as a share of what it is compared with."""

_JOB = "equipoise.bench.dispatch_rank:measure_dispatch"
_PACKAGES = ("torch", "transformers", "nixl-cu13")
_NOTES = (
    "seconds: one dispatch and one combine on the slowest rank, median of the rounds; the experts "
    "between them are the identity, on both sides. ratio: over peer_seconds, measured in turns by "
    "the same processes; what came home was compared with the tokens on both sides.",
    "transformers' all_to_all: its own expert parallelism (AllToAllEP) on the same tokens and "
    "routes. bare kernels: the same calls of NIXL-EP without Equipoise around them. Hidden states "
    "are bfloat16; FP8 is how they travel to the experts.",
)
_CPU_NOTE = (
    "Not measured here, as they need two GPUs: torch over NCCL, and nixl_ep (on a machine with "
    "two: --device cuda). Nor ranks on more than one machine."
)
_GPU_NOTE = "Not measured here: torch over gloo (--device cpu), and ranks on more than one machine."


def compare_dispatch(
    spec: DispatchSpec,
    device: Literal["cpu", "cuda"],
    on_said: Callable[[DispatchSaid], None] = lambda _: None,
) -> BenchOutcome:
    """Send the same tokens both ways, on processes of this machine.

    Args:
        spec: what to send.
        device: where tokens are.
        on_said: called with each case's figures as they are found.
    Returns:
        A row for each case that was measured. A case that failed costs itself alone: it stands in
        `figures["failed"]` with its error, and the cases behind it are measured by other ranks.
    Collective: none; starts the ranks, and leaves none.
    Raises: ConfigError if there is no such device.
    """
    heard, failed = _measure_all(spec, device, on_said)
    left_out = [said for said in heard if isinstance(said, DispatchLeftOut)]
    return BenchOutcome(
        name="dispatch",
        setting={
            "device": device,
            "ranks": spec.num_ranks,
            "rounds": spec.num_rounds,
            "seed": spec.seed,
        },
        rows=tuple(_make_row(said) for said in heard if isinstance(said, DispatchMeasured)),
        notes=(
            *(f"{said.case.backend}, {said.case.name}: {said.reason}" for said in left_out),
            *(f"{case.backend}, {case.name}: FAILED, {error}" for case, error in failed),
            *_NOTES,
            _CPU_NOTE if device == "cpu" else _GPU_NOTE,
        ),
        versions={name: _find_version(name) for name in _PACKAGES},
        figures={
            "failed": [
                {"backend": case.backend, "case": case.name, "error": error}
                for case, error in failed
            ]
        },
    )


def _measure_all(
    spec: DispatchSpec, device: Literal["cpu", "cuda"], on_said: Callable[[DispatchSaid], None]
) -> tuple[list[DispatchSaid], list[tuple[DispatchCase, str]]]:
    """What was said of the cases, and those that failed, each with its error."""
    heard: list[DispatchSaid] = []
    failed: list[tuple[DispatchCase, str]] = []

    def hear(said: DispatchSaid) -> None:
        heard.append(said)
        on_said(said)

    while left := spec.cases[len(heard) + len(failed) :]:
        seats = assign_local_seats(spec.num_ranks, device)
        try:
            run_local(replace(spec, cases=left), seats, hear, job=_JOB)
        except JobFailed as error:
            # Cases are told of in order, once every rank is through with them.
            failed.append((spec.cases[len(heard) + len(failed)], str(error)))
    return heard, failed


def _make_row(said: DispatchMeasured) -> Row:
    case = said.case
    seconds, peer_seconds = median(said.seconds), median(said.peer_seconds)
    row: Row = {
        "backend": case.backend,
        "wire": said.wire,
        "case": case.name,
        "seconds": seconds,
        "peer": case.peer,
        "peer_seconds": peer_seconds,
        "ratio": seconds / peer_seconds,
        "tokens_per_rank": case.num_tokens,
        "seconds_of_rounds": list(said.seconds),
        "peer_seconds_of_rounds": list(said.peer_seconds),
    }
    return with_goal(row, "ratio", GOALS[case.peer], at_most=True)


def _find_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
