"""Loading a checkpoint, beside a plain read of its files, in one run."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Literal

from equipoise.bench.load_case import FilesMade, LoadMeasured, LoadSaid, LoadSpec
from equipoise.bench.outcome import BenchOutcome, Row, with_goal
from equipoise.errors import ConfigError
from equipoise.launch.local import run_local
from equipoise.launch.seats import assign_local_seats
from equipoise.models.read_ahead import CHUNK_BYTES, NUM_THREADS

GOAL = 0.8
"""The least of a plain read's speed that loading should have, on GPUs."""

_JOB = "equipoise.bench.load_rank:measure_load"
_NOTES = (
    "seconds: from the directory to weights on the device, on the slowest rank, median of the "
    "rounds: headers, the model without weights, experts of this rank and what all ranks have. "
    "Imports and the wires of rebalancing are not counted. Some weights of each load were compared "
    "with what is stored.",
    f"plain_seconds: reading all files once into memory of the host, each rank its share, with "
    f"{NUM_THREADS} threads of {CHUNK_BYTES >> 20} MiB at a time, as loading does on a GPU. "
    "ratio: plain_seconds over seconds.",
)
_CPU_NOTE = (
    "The goal is for two GPUs (on a machine with two: --device cuda): on a CPU, where loading "
    "copies weights once more and reads nothing ahead, rows have none."
)


def compare_load(
    spec: LoadSpec,
    folder: Path,
    device: Literal["cpu", "cuda"],
    on_said: Callable[[LoadSaid], None] = lambda _: None,
) -> BenchOutcome:
    """Make a checkpoint in a folder, load and read it, and remove it.

    Args:
        spec: what to make; its directory is chosen here.
        folder: where there is room for it.
        device: where weights go.
        on_said: called with figures as they are found.
    Collective: none; starts the ranks, and leaves none.
    Raises: ConfigError if the folder is not there or lacks room, or there is no such device;
        JobFailed, naming the rank, if one fails.
    """
    seats = assign_local_seats(spec.num_ranks, device)
    _check_room(folder, spec.size.num_bytes)
    heard: list[LoadSaid] = []

    def hear(said: LoadSaid) -> None:
        heard.append(said)
        on_said(said)

    directory = tempfile.mkdtemp(prefix="equipoise-bench-load-", dir=folder)
    try:
        run_local(replace(spec, directory=directory), seats, hear, job=_JOB)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    rows = _make_rows([said for said in heard if isinstance(said, LoadMeasured)], heard, device)
    return BenchOutcome(
        name="load",
        setting={
            "device": device,
            "ranks": spec.num_ranks,
            "rounds": spec.num_rounds,
            "layers": spec.size.num_layers,
            "experts": spec.size.num_experts,
            "bytes": spec.size.num_bytes,
        },
        rows=rows,
        notes=(
            *_say_made(heard),
            *_say_cached(rows),
            *_NOTES,
            *((_CPU_NOTE,) if device == "cpu" else ()),
        ),
        versions={name: version(name) for name in ("torch", "transformers", "safetensors")},
    )


def _check_room(folder: Path, num_bytes: int) -> None:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder")
    free = shutil.disk_usage(folder).free
    if free < 1.05 * num_bytes:
        raise ConfigError(
            f"{folder}: has {free / 1e9:.1f} GB free, but the files take {num_bytes / 1e9:.1f} GB: "
            "name another folder or a smaller --gigabytes"
        )


def _make_rows(
    measured: Sequence[LoadMeasured], heard: Sequence[LoadSaid], device: str
) -> tuple[Row, ...]:
    (num_bytes,) = (said.num_bytes for said in heard if isinstance(said, FilesMade))
    rows = []
    for cache in ("cold", "warm"):
        rounds = [said for said in measured if said.cache == cache]
        seconds = median(said.seconds for said in rounds)
        plain_seconds = median(said.plain_seconds for said in rounds)
        row: Row = {
            "cache": cache,
            "seconds": seconds,
            "gb_per_s": num_bytes / seconds / 1e9,
            "plain_seconds": plain_seconds,
            "plain_gb_per_s": num_bytes / plain_seconds / 1e9,
            "ratio": plain_seconds / seconds,
            "first_byte_s": median(said.first_byte_s for said in rounds),
            "last_byte_s": median(said.last_byte_s for said in rounds),
            "file_bytes": num_bytes,
            "bytes_read": rounds[-1].bytes_read,
            "cached": _find_cached(rounds),
            "seconds_of_rounds": [said.seconds for said in rounds],
            "plain_seconds_of_rounds": [said.plain_seconds for said in rounds],
        }
        rows.append(with_goal(row, "ratio", GOAL) if device == "cuda" else row)
    return tuple(rows)


def _find_cached(rounds: Sequence[LoadMeasured]) -> float | None:
    """The share that was furthest from what was wanted."""
    shares = [share for said in rounds for share in said.cached]
    known = [share for share in shares if share is not None]
    if len(known) < len(shares):
        return None
    return max(known) if rounds[0].cache == "cold" else min(known)


def _say_made(heard: Sequence[LoadSaid]) -> list[str]:
    return [
        f"The files, {made.num_bytes / 1e9:.2f} GB, were made in {made.seconds:.1f} s "
        f"({made.num_bytes / made.seconds / 1e9:.2f} GB/s) and removed."
        for made in heard
        if isinstance(made, FilesMade)
    ]


def _say_cached(rows: Sequence[Row]) -> list[str]:
    said = []
    for row in rows:
        cached, cold = row["cached"], row["cache"] == "cold"
        if cached is None:
            said.append(
                f"{row['cache']}: the file system does not say whether files were in the page "
                "cache, nor whether it could be dropped."
            )
        elif cold and cached > 0.02:
            said.append(
                f"cold: the page cache could not be dropped: {cached:.0%} of the files were in it."
            )
        elif not cold and cached < 0.98:
            said.append(f"warm: only {cached:.0%} of the files were in the page cache.")
    return said
