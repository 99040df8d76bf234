"""Wires between GPUs, each compared with what the same link gave in the same run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from equipoise.bench.gpu_rank import (
    GpuSaid,
    GpuSpec,
    Limit,
    LimitFound,
    Staging,
    WireLeftOut,
    WireMeasured,
)
from equipoise.bench.host_time import measure_host_time
from equipoise.bench.outcome import BenchOutcome, Row, with_goal
from equipoise.launch.local import run_local
from equipoise.launch.seats import assign_local_seats

_JOB = "equipoise.bench.gpu_rank:measure_on_gpus"
_PACKAGES = ("torch", "nixl-cu13", "nixl-cu12", "nccl4py")
_ONE_BUFFER = 0.6
"""What one staging buffer should reach of the goals: nothing travels while it is emptied."""

_GLOO_GB_PER_S = 4.5
"""Three times what vLLM 0.33.0's staged gloo moved between two H200 of one host, in GB/s."""

# Of each wire: what it is compared with, and the least share of it that it should reach.
_GOALS: dict[str, tuple[tuple[Limit, float], ...]] = {
    "nixl": (("bare READs of the same chunks", 0.9), ("one READ in place", 0.65)),
    "torch_nccl": (("one NCCL message", 0.8),),
    "pynccl": (("one NCCL message", 0.8),),
}
_IN_PLACE_GOALS: tuple[tuple[Limit, float], ...] = (("one READ in place", 0.9),)

_NOTES = (
    "gb_per_s: bytes received by the rank that receives most, over seconds, from the call of "
    "rearrange_expert_weights_inplace, with its plan made, until the last slot is filled; median "
    "of the rounds, of the slowest rank in each. Half of every rank's slots get experts of another "
    "rank, and the others keep theirs, but where all are dealt anew.",
    "ratio: over limit_gb_per_s, measured in the same run on the same GPUs.",
    "Every word of every slot was compared with what belongs there after every round.",
    "extra_bytes: most GPU memory beside the weights on any rank: staging, the wire's buffers, and "
    "what NCCL or NIXL took outside torch.",
)


def compare_on_gpus(
    spec: GpuSpec, on_said: Callable[[GpuSaid], None] = lambda _: None
) -> BenchOutcome:
    """Move the experts of every case over every wire, on GPUs of this machine.

    Args:
        spec: what to move, and over what.
        on_said: called with each figure as it is found.
    Collective: none; starts the ranks, and leaves none.
    Raises: ConfigError if there is no GPU; JobFailed, naming the rank, if one fails.
    """
    heard: list[GpuSaid] = []

    def hear(said: GpuSaid) -> None:
        heard.append(said)
        on_said(said)

    run_local(spec, assign_local_seats(spec.num_ranks, "cuda"), hear, job=_JOB)
    limits = [said for said in heard if isinstance(said, LimitFound)]
    wires = [said for said in heard if isinstance(said, WireMeasured)]
    left_out = {said.backend: said.reason for said in heard if isinstance(said, WireLeftOut)}
    rows = [_make_limit_row(limit) for limit in limits]
    rows += [row for wire in wires for row in _make_rows(wire, limits, spec)]
    return BenchOutcome(
        name="transfer",
        setting={
            "device": "cuda",
            "gpus": torch.cuda.device_count(),
            "gpu": torch.cuda.get_device_name(0),
            "ranks": spec.num_ranks,
            "rounds": spec.num_rounds,
            "seed": spec.seed,
            "cases": [
                {
                    "name": case.name,
                    "layers": case.num_layers,
                    "slots_per_rank": case.slots_per_rank,
                    "tensor_bytes": list(case.tensor_bytes),
                    "kind": case.kind,
                }
                for case in spec.cases
            ],
        },
        rows=(*rows, *_compare_nixl_with_gloo(wires), measure_host_time(spec.seed)),
        notes=(*(f"{name} does not work here: {why}" for name, why in left_out.items()), *_NOTES),
        versions={name: _find_version(name) for name in _PACKAGES},
    )


def _make_limit_row(limit: LimitFound) -> Row:
    return {
        "case": limit.case,
        "backend": limit.limit,
        "staging": limit.staging,
        "bytes_received_per_rank": limit.received_bytes,
        "seconds": limit.seconds,
        "gb_per_s": limit.received_bytes / limit.seconds / 1e9,
    }


def _make_rows(wire: WireMeasured, limits: Sequence[LimitFound], spec: GpuSpec) -> list[Row]:
    row: Row = {
        "case": wire.case,
        "backend": wire.backend,
        "staging": wire.staging,
        "bytes_received_per_rank": wire.received_bytes,
        "seconds": wire.seconds,
        "gb_per_s": wire.received_bytes / wire.seconds / 1e9,
        "extra_bytes": wire.extra_bytes,
        "staging_bytes": wire.staging_bytes,
        "num_chunks": wire.num_chunks,
    }
    if wire.backend == "torch_gloo":
        return [with_goal(row, "gb_per_s", _GLOO_GB_PER_S)]
    kind = next(case.kind for case in spec.cases if case.name == wire.case)
    goals = _GOALS.get(wire.backend, ())
    if kind == "fill" and wire.backend == "nixl":
        goals = _IN_PLACE_GOALS
    factor = _ONE_BUFFER if wire.staging == "one buffer" else 1.0
    rows = []
    for name, goal in goals:
        found = _find_limit(limits, wire.case, name, wire.staging)
        if found is not None:
            compared = {
                **row,
                "limit": name,
                "limit_gb_per_s": wire.received_bytes / found.seconds / 1e9,
                "ratio": found.seconds / wire.seconds,
            }
            has_goal = kind != "deal" and wire.staging != "two of a layer"
            rows.append(
                with_goal(compared, "ratio", round(goal * factor, 3)) if has_goal else compared
            )
    return rows or [row]


def _find_limit(
    limits: Sequence[LimitFound], case: str, name: Limit, staging: Staging
) -> LimitFound | None:
    for limit in limits:
        if (limit.case, limit.limit) == (case, name) and limit.staging in (None, staging):
            return limit
    return None


def _compare_nixl_with_gloo(wires: Sequence[WireMeasured]) -> list[Row]:
    rows = []
    for gloo in wires:
        for nixl in wires:
            same = (nixl.case, nixl.staging) == (gloo.case, gloo.staging)
            if same and (nixl.backend, gloo.backend) == ("nixl", "torch_gloo"):
                row: Row = {
                    "case": gloo.case,
                    "backend": "nixl",
                    "staging": nixl.staging,
                    "limit": "torch_gloo",
                    "ratio": gloo.seconds / nixl.seconds,
                }
                rows.append(with_goal(row, "ratio", 10.0))
    return rows


def _find_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
