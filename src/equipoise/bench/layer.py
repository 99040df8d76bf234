"""The forward pass of one MoE layer, beside transformers' own expert parallelism, in one run."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from statistics import median
from typing import Any, Literal

from equipoise.bench.layer_case import LayerMeasured, LayerSpec
from equipoise.bench.outcome import BenchOutcome, Row, with_goal
from equipoise.launch.local import run_local
from equipoise.launch.seats import assign_local_seats

GOAL = 1.0
"""The most that ours should take where routing is uniform, as a share of transformers'."""

_JOB = "equipoise.bench.layer_rank:measure_layer"
_NOTES = (
    "seconds: choosing slots, counting them, dispatch, experts and combine, on the slowest rank, "
    "median of the rounds; experts are Qwen3-MoE's module of transformers on both sides, with the "
    "same weights, tokens and kernels. peer_seconds: transformers' AllToAllEP, measured in turns "
    "by the same processes. ratio: seconds over peer_seconds; outputs were compared.",
    "skewed: popular experts lie side by side, on the first ranks; seconds is with them placed by "
    "`flow` for this load, in order is without. gain: in order over balanced. imbalance: of the "
    "busiest rank's rows over the mean, before and after.",
)
_CPU_NOTE = "Not measured here, as it needs two GPUs: tokens over NCCL (--device cuda)."


def compare_layer(
    spec: LayerSpec,
    device: Literal["cpu", "cuda"],
    on_said: Callable[[LayerMeasured], None] = lambda _: None,
) -> BenchOutcome:
    """Compute the same tokens both ways, on processes of this machine.

    Args:
        spec: what to compute.
        device: where tokens and experts are.
        on_said: called with each case's figures as they are found.
    Collective: none; starts the ranks, and leaves none.
    Raises: ConfigError if there is no such device; JobFailed, naming the rank, if one fails.
    """
    heard: list[LayerMeasured] = []

    def hear(said: LayerMeasured) -> None:
        heard.append(said)
        on_said(said)

    run_local(spec, assign_local_seats(spec.num_ranks, device), hear, job=_JOB)
    size = spec.size
    return BenchOutcome(
        name="layer",
        setting={
            "device": device,
            "ranks": spec.num_ranks,
            "rounds": spec.num_rounds,
            "seed": spec.seed,
            "skew": spec.skew,
            "kernels": spec.kernels,
            "dtype": size.dtype,
            "experts": size.num_experts,
            "top_k": size.top_k,
            "hidden_size": size.hidden_size,
            "expert_size": size.expert_size,
            "redundant": size.num_redundant,
        },
        rows=tuple(_make_row(said) for said in heard),
        notes=(*_NOTES, *((_CPU_NOTE,) if device == "cpu" else ())),
        versions={name: version(name) for name in ("torch", "transformers")},
    )


def _make_row(said: LayerMeasured) -> Row:
    case = said.case
    taken = {name: median(several) for name, several in said.seconds.items()}
    uniform = case.routing == "uniform"
    seconds = taken["ours" if uniform else "balanced"]
    row: dict[str, Any] = {
        "routing": case.routing,
        "tokens_per_rank": case.num_tokens,
        "wire": said.wire,
        "seconds": seconds,
        "peer_seconds": taken["theirs"],
        "ratio": seconds / taken["theirs"],
        "imbalance": said.imbalance["ours"],
    }
    if uniform:
        row = with_goal(row, "ratio", GOAL, at_most=True)
    else:
        row |= {
            "balanced_imbalance": said.imbalance["balanced"],
            "in_order_seconds": taken["ours"],
            "gain": taken["ours"] / seconds,
        }
    return {
        **row,
        "seconds_of_rounds": {name: list(several) for name, several in said.seconds.items()},
    }
