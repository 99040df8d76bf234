"""`equipoise bench dispatch`: tokens to their experts and home, beside what others do."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

import typer

from equipoise.cli.bench import JsonPath, check_json_path, show_outcome
from equipoise.errors import EquipoiseError

_COLUMNS = (
    ("backend", "backend"),
    ("wire", "wire"),
    ("case", "case"),
    ("s", "seconds"),
    ("beside", "peer"),
    ("s", "peer_seconds"),
    ("ratio", "ratio"),
    ("goal", "goal"),
    ("met", "met"),
)


class DispatchDevice(StrEnum):
    """Where the tokens are."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


def bench_dispatch(
    device: Annotated[
        DispatchDevice, typer.Option(help="Where tokens are; auto: on GPUs if there are two.")
    ] = DispatchDevice.AUTO,
    ranks: Annotated[int, typer.Option(help="Processes, at least 2.")] = 2,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of each rank; one case of torch instead of all.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="How often each side is timed.")] = 11,
    seed: Annotated[int, typer.Option(help="Of the tokens and their routes.")] = 0,
    timeout: Annotated[float, typer.Option(help="Longest wait for another rank, in s.")] = 60.0,
    json_path: JsonPath = None,
) -> None:
    """Send tokens to their experts and home, beside transformers and bare kernels.

    A case that fails is told of at the end; the others' figures are kept.
    """
    check_json_path(json_path)
    from equipoise.bench.dispatch import compare_dispatch
    from equipoise.bench.dispatch_case import DispatchCase, DispatchSpec, make_cases

    on_gpus = device is DispatchDevice.CUDA or (
        device is DispatchDevice.AUTO and _count_gpus() >= 2
    )
    cases = make_cases(on_gpus=on_gpus)
    if tokens is not None:
        cases = (DispatchCase("torch", tokens, 2048, 8, 128, 1),)
    spec = DispatchSpec(cases, rounds, ranks, seed, timeout)
    where: Literal["cpu", "cuda"] = "cuda" if on_gpus else "cpu"
    outcome = compare_dispatch(spec, where)
    show_outcome(outcome, _COLUMNS, json_path)
    if failed := outcome.figures["failed"]:
        names = "; ".join(f"{each['backend']}, {each['case']}: {each['error']}" for each in failed)
        raise EquipoiseError(f"{len(failed)} of {len(cases)} cases failed: {names}")


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()
