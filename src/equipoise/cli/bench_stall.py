"""`equipoise bench stall`: step times with rebalances beside them, and without."""

from __future__ import annotations

from typing import Annotated

import typer

from equipoise.cli.bench import JsonPath, check_json_path, show_outcome

_COLUMNS = (("what", "what"), ("value", "value"), ("goal", "goal"), ("met", "met"))


def bench_stall(
    ranks: Annotated[int, typer.Option(help="Processes, at least 2.")] = 2,
    layers: Annotated[int, typer.Option(help="Layers.")] = 58,
    slots: Annotated[int, typer.Option(help="Slots of each rank, one of them redundant.")] = 9,
    expert_bytes: Annotated[int, typer.Option(help="Bytes of one expert of one layer.")] = 65_536,
    step_ms: Annotated[float, typer.Option(help="What a step computes, in ms.")] = 15.0,
    steps: Annotated[int, typer.Option(help="Steps of each kind.")] = 1000,
    communicator: Annotated[str, typer.Option(help="Wire for weights.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the load.")] = 0,
    timeout: Annotated[float, typer.Option(help="Longest wait for another rank, in s.")] = 60.0,
    json_path: JsonPath = None,
) -> None:
    """Compare step times with rebalances in the background and without, in one run."""
    check_json_path(json_path)
    from equipoise.bench.stall import measure_stalls
    from equipoise.bench.stall_rank import StallSpec
    from equipoise.comm.registry import check_name

    check_name(communicator)
    spec = StallSpec(
        num_ranks=ranks,
        num_layers=layers,
        slots_per_rank=slots,
        expert_bytes=expert_bytes,
        step_ms=step_ms,
        num_steps=steps,
        communicator=communicator,
        seed=seed,
        timeout_s=timeout,
    )
    show_outcome(measure_stalls(spec), _COLUMNS, json_path)
