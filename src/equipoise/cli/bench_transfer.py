"""`equipoise bench transfer`: wires for expert weights, side by side."""

from __future__ import annotations

from typing import Annotated

import typer

from equipoise.cli.bench import JsonPath, check_json_path, show_outcome

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


def bench_transfer(
    ranks: Annotated[int, typer.Option(help="Processes, at least 2.")] = 4,
    layers: Annotated[int, typer.Option(help="Layers.")] = 10,
    slots: Annotated[int, typer.Option(help="Slots of each rank, per layer.")] = 8,
    expert_bytes: Annotated[
        int, typer.Option(help="Bytes of one expert; those of Qwen3-30B-A3B in FP8.")
    ] = 4_718_592,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Communicator; may be repeated. By default all that work here."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="How often each is measured.")] = 25,
    seed: Annotated[int, typer.Option(help="Of the placement and of the experts' bytes.")] = 0,
    timeout: Annotated[float, typer.Option(help="Longest wait for another rank, in s.")] = 60.0,
    json_path: JsonPath = None,
) -> None:
    """Move experts between processes over every wire, each beside what limits it."""
    check_json_path(json_path)
    from equipoise.bench.transfer import compare_transfers
    from equipoise.bench.transfer_case import TransferSpec

    spec = TransferSpec(
        num_ranks=ranks,
        num_layers=layers,
        slots_per_rank=slots,
        expert_bytes=expert_bytes,
        backends=tuple(dict.fromkeys(backend or ())),
        num_rounds=rounds,
        seed=seed,
        timeout_s=timeout,
    )
    show_outcome(compare_transfers(spec), _COLUMNS, json_path)
