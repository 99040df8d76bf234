"""`equipoise bench load`: a checkpoint onto ranks, beside a plain read of its files."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from equipoise.cli.bench import JsonPath, check_json_path, show_outcome

_COLUMNS = (
    ("page cache", "cache"),
    ("load, s", "seconds"),
    ("GB/s", "gb_per_s"),
    ("plain read, s", "plain_seconds"),
    ("GB/s", "plain_gb_per_s"),
    ("ratio", "ratio"),
    ("before the first byte, s", "first_byte_s"),
    ("after the last, s", "last_byte_s"),
    ("goal", "goal"),
    ("met", "met"),
)


class LoadDevice(StrEnum):
    """Where weights go."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


def bench_load(
    folder: Annotated[
        Path, typer.Argument(help="On the disk to be read; files are made in it and removed.")
    ],
    device: Annotated[
        LoadDevice, typer.Option(help="Where weights go; auto: to GPUs if there are two.")
    ] = LoadDevice.AUTO,
    gigabytes: Annotated[
        float | None, typer.Option(help="About the size; 20 for GPUs, 0.5 for a CPU.")
    ] = None,
    ranks: Annotated[int, typer.Option(help="Processes.")] = 2,
    rounds: Annotated[int, typer.Option(help="Loads and reads, cold and warm each.")] = 2,
    timeout: Annotated[float, typer.Option(help="Longest wait for another rank, in s.")] = 600.0,
    json_path: JsonPath = None,
) -> None:
    """Load a checkpoint that is made for it onto ranks, beside a plain read of its files."""
    check_json_path(json_path)
    from equipoise.bench.load import compare_load
    from equipoise.bench.load_case import LoadSpec
    from equipoise.bench.load_files import choose_size
    from equipoise.bench.option_checks import check_positive

    on_gpus = device is LoadDevice.CUDA or (device is LoadDevice.AUTO and _count_gpus() >= 2)
    if gigabytes is None:
        gigabytes = 20.0 if on_gpus else 0.5
    check_positive(("--gigabytes", gigabytes))
    spec = LoadSpec(
        str(folder), choose_size(gigabytes * 1e9, large=on_gpus), ranks, rounds, timeout
    )
    where: Literal["cpu", "cuda"] = "cuda" if on_gpus else "cpu"
    show_outcome(compare_load(spec, folder, where), _COLUMNS, json_path)


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()
