"""`equipoise bench transfer`: wires for expert weights, side by side."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, cast

import typer

from equipoise.cli.bench import JsonPath, check_json_path, show_outcome
from equipoise.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from equipoise.bench.gpu_case import Kind as CaseKind
    from equipoise.bench.outcome import BenchOutcome
    from equipoise.bench.transfer_case import TransferSpec

_COLUMNS = (
    ("backend", "backend"),
    ("bytes/rank", "bytes_received_per_rank"),
    ("s", "seconds"),
    ("GB/s", "gb_per_s"),
    ("limit", "limit"),
    ("GB/s", "limit_gb_per_s"),
    ("ratio", "ratio"),
    ("goal", "goal"),
    ("met", "met"),
    ("extra bytes", "peak_extra_bytes"),
)
_GPU_COLUMNS = (
    ("case", "case"),
    ("backend", "backend"),
    ("staging", "staging"),
    ("s", "seconds"),
    ("GB/s", "gb_per_s"),
    ("limit", "limit"),
    ("GB/s", "limit_gb_per_s"),
    ("ratio", "ratio"),
    ("goal", "goal"),
    ("met", "met"),
    ("extra bytes", "extra_bytes"),
    ("chunks", "num_chunks"),
)


class Kind(StrEnum):
    """How experts move between GPUs, as in `GpuCase`."""

    SWAP = "swap"
    FILL = "fill"
    DEAL = "deal"


class Device(StrEnum):
    """Where the experts are."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


def bench_transfer(
    device: Annotated[
        Device, typer.Option(help="Where experts are; auto: on GPUs if there are two.")
    ] = Device.AUTO,
    ranks: Annotated[
        int | None, typer.Option(help="Processes, at least 2; 4 on the CPU, 2 on GPUs.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="Layers; 10 on the CPU. On GPUs one case instead of four.")
    ] = None,
    slots: Annotated[
        int | None, typer.Option(help="Slots of each rank, per layer; 8 on the CPU.")
    ] = None,
    expert_bytes: Annotated[
        int | None, typer.Option(help="Bytes of one expert; those of Qwen3-30B-A3B in FP8.")
    ] = None,
    kind: Annotated[
        list[Kind] | None,
        typer.Option(
            help="On GPUs: half of the slots change places with another rank's (swap), empty ones "
            "are filled (fill), or all are dealt anew (deal). May be repeated; by default all, and "
            "swap where sizes are given."
        ),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Communicator; may be repeated. By default all that work here."),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="How often each is measured; 25 on the CPU, 6 on GPUs.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the placement and of the experts' bytes.")] = 0,
    timeout: Annotated[float, typer.Option(help="Longest wait for another rank, in s.")] = 60.0,
    json_path: JsonPath = None,
) -> None:
    """Move experts between processes over every wire, each beside what limits it."""
    check_json_path(json_path)
    from equipoise.bench.transfer_case import QWEN3_30B_EXPERT_BYTES, TransferSpec

    is_custom = any(value is not None for value in (layers, slots, expert_bytes))
    on_gpus = device is Device.CUDA or (device is Device.AUTO and count_gpus() >= 2)
    default_ranks, default_rounds = (2, 6) if on_gpus else (4, 25)
    spec = TransferSpec(
        num_ranks=default_ranks if ranks is None else ranks,
        num_layers=10 if layers is None else layers,
        slots_per_rank=8 if slots is None else slots,
        expert_bytes=QWEN3_30B_EXPERT_BYTES if expert_bytes is None else expert_bytes,
        backends=tuple(dict.fromkeys(backend or ())),
        num_rounds=default_rounds if rounds is None else rounds,
        seed=seed,
        timeout_s=timeout,
    )
    if on_gpus:
        show_outcome(_compare_on_gpus(spec, is_custom, kind or ()), _GPU_COLUMNS, json_path)
        return
    if kind:
        raise ConfigError("--kind is for GPUs: on the CPU every slot gets another expert")
    from equipoise.bench.transfer import compare_transfers

    show_outcome(compare_transfers(spec), _COLUMNS, json_path)


def count_gpus() -> int:
    """That torch sees."""
    import torch

    return torch.cuda.device_count()


def _compare_on_gpus(spec: TransferSpec, is_custom: bool, kinds: Sequence[Kind]) -> BenchOutcome:
    from equipoise.bench.gpu import compare_on_gpus
    from equipoise.bench.gpu_case import DEFAULT_CASES, GpuCase
    from equipoise.bench.gpu_rank import GpuSpec
    from equipoise.comm import list_communicators

    wanted = cast("tuple[CaseKind, ...]", tuple(dict.fromkeys(kind.value for kind in kinds)))
    cases = tuple(case for case in DEFAULT_CASES if not wanted or case.kind in wanted)
    if is_custom:
        third = spec.expert_bytes // 24 * 8
        sizes = (spec.expert_bytes - third, third)
        cases = tuple(
            GpuCase(f"as given, {kind}", spec.num_layers, spec.slots_per_rank, sizes, kind)
            for kind in wanted or ("swap",)
        )
    gpu_spec = GpuSpec(
        cases=cases,
        backends=spec.backends or list_communicators(),
        num_rounds=spec.num_rounds,
        seed=spec.seed,
        num_ranks=spec.num_ranks,
        timeout_s=spec.timeout_s,
    )
    return compare_on_gpus(gpu_spec)
