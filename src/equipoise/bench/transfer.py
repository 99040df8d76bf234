"""Wires for expert weights, compared in one run on the same plan."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean, median

from equipoise.bench.host_time import measure_host_time
from equipoise.bench.outcome import BenchOutcome, Row, with_goal
from equipoise.bench.transfer_case import TransferCase, TransferSpec, make_case
from equipoise.bench.transfer_rank import LeftOut, Measured, Said, find_limit
from equipoise.errors import ConfigError
from equipoise.launch.local import run_local
from equipoise.launch.seats import assign_local_seats

GOAL = 0.8
"""The least share of its limit that a wire of ours should reach."""

_JOB = "equipoise.bench.transfer_rank:measure_transfers"
_WITH_GOAL = ("nixl", "torch_gloo")
_PACKAGES = ("torch", "nixl-cu13", "nixl-cu12", "rixl")
_BYTES_PER_PROCESS = 400 << 20
"""What torch and the wires take beside the weights, about."""

_NOTES = (
    "ratio: gb_per_s over limit_gb_per_s, measured in turns by the same processes; seconds: median "
    "of the rounds, of the slowest rank in each. memcpy: every rank copies as many bytes as it "
    "receives, all at once. raw gloo message: one send and one receive of the same bytes per pair.",
    "Every received expert was compared with the plan, byte by byte, after every round.",
    "processor alone: planning 58 layers x 288 slots on 32 ranks anew, and issuing one rank's "
    "share, without a wire.",
    "Not measured here, as they need GPUs: torch_nccl, pynccl, nixl between the memories of GPUs, "
    "torch_gloo staged through pinned memory (on a machine with two GPUs: --device cuda). Nor "
    "ranks on more than one machine.",
)
_PEAK_NOTE = (
    "peak_extra_bytes: most by which any rank's resident memory (VmHWM) exceeded what it was "
    "before the communicator was made; weights and the buffer for what is received are not in it."
)
_NO_PEAK_NOTE = "peak_extra_bytes: not measured, as this system does not reset VmHWM."


def compare_transfers(
    spec: TransferSpec, on_backend: Callable[[str], None] = lambda _: None
) -> BenchOutcome:
    """Move the same experts over every backend, on processes of this machine.

    Args:
        spec: what to move, and over what.
        on_backend: called with each backend's name when it was measured.
    Collective: none; starts the ranks, and leaves none.
    Raises: ConfigError if nothing moves or memory is short; JobFailed, naming the rank, if one
        fails, dies or receives a wrong byte.
    """
    case = make_case(spec)
    _check_memory(case)
    heard: list[Said] = []

    def hear(said: Said) -> None:
        heard.append(said)
        on_backend(said.backend)

    run_local(spec, assign_local_seats(spec.num_ranks, "cpu"), hear, job=_JOB)
    measured = [said for said in heard if isinstance(said, Measured)]
    left_out = [said for said in heard if isinstance(said, LeftOut)]
    blind = any(said.peak_extra_bytes is None for said in measured)
    return BenchOutcome(
        name="transfer",
        setting={
            "ranks": spec.num_ranks,
            "layers": spec.num_layers,
            "slots_per_rank": spec.slots_per_rank,
            "expert_bytes": spec.expert_bytes,
            "moves": case.plan.num_moves,
            "rounds": spec.num_rounds,
            "seed": spec.seed,
            "device": "cpu",
        },
        rows=(*(_make_row(case, said) for said in measured), measure_host_time(spec.seed)),
        notes=(
            *(f"{said.backend} does not work here: {said.reason}" for said in left_out),
            *_NOTES,
            _NO_PEAK_NOTE if blind else _PEAK_NOTE,
        ),
        versions={name: _find_version(name) for name in _PACKAGES},
    )


def _make_row(case: TransferCase, measured: Measured) -> Row:
    received = round(fmean(case.received_bytes))
    seconds, limit_seconds = median(measured.seconds), median(measured.limit_seconds)
    row: Row = {
        "backend": measured.backend,
        "bytes_received_per_rank": received,
        "seconds": seconds,
        "gb_per_s": received / seconds / 1e9,
        "limit": find_limit(measured.backend),
        "limit_gb_per_s": received / limit_seconds / 1e9,
        "ratio": limit_seconds / seconds,
        "peak_extra_bytes": measured.peak_extra_bytes,
        "seconds_of_rounds": list(measured.seconds),
        "limit_seconds_of_rounds": list(measured.limit_seconds),
    }
    return with_goal(row, "ratio", GOAL) if measured.backend in _WITH_GOAL else row


def _check_memory(case: TransferCase) -> None:
    """Refuse what would get a rank killed for want of memory; where the system tells."""
    spec = case.spec
    weights = spec.num_layers * spec.slots_per_rank * spec.expert_bytes
    # Weights, what is received, and what a wire may stage both ways.
    needed = sum(weights + 3 * received + _BYTES_PER_PROCESS for received in case.received_bytes)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    if free and needed > free[0]:
        raise ConfigError(
            f"{spec.num_ranks} ranks of {weights / 1e9:.1f} GB of experts may take "
            f"{needed / 1e9:.1f} GB, and {free[0] / 1e9:.1f} GB are free: take fewer --ranks, "
            "--layers or --slots, or smaller --expert-bytes"
        )


def _find_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
