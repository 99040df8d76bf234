"""`equipoise bench stall`: step times with rebalances beside them, and without."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from typing import Annotated, Any

import typer

from equipoise.bench.option_checks import check_least
from equipoise.cli.bench import JsonPath, check_json_path, show_outcome

_COLUMNS = (("what", "what"), ("value", "value"), ("goal", "goal"), ("met", "met"))


class Device(StrEnum):
    """Where steps compute."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Launch(StrEnum):
    """How GPUs get a step."""

    GRAPH = "graph"
    EAGER = "eager"


_DeviceOption = Annotated[
    Device, typer.Option(help="Where steps compute; auto: on GPUs if there are two.")
]
_Ranks = Annotated[int, typer.Option(help="Processes, at least 2.")]
_Layers = Annotated[int, typer.Option(help="Layers.")]
_Slots = Annotated[
    int | None,
    typer.Option(help="Slots of each rank, one of them redundant; 9 on the CPU, 65 on GPUs."),
]
_ExpertBytes = Annotated[
    int | None,
    typer.Option(help="Bytes of one expert of one layer; 65,536 on the CPU, 9.4 M on GPUs."),
]
_StepMs = Annotated[
    float | None,
    typer.Option(help="What a step computes at least, in ms; 15 on the CPU, 12 on GPUs."),
]
_LaunchOption = Annotated[
    Launch, typer.Option(help="GPUs get a step as one captured graph, or kernel by kernel.")
]
_Steps = Annotated[
    int | None, typer.Option(help="Steps of each kind; 1,000 on the CPU, 2,000 on GPUs.")
]
_Communicator = Annotated[
    str | None, typer.Option(help="Wire for weights; auto on the CPU, nixl on GPUs.")
]
_Policy = Annotated[
    str | None,
    typer.Option(
        help="What plans; deepseek on the CPU, which plans from nothing and moves half of all "
        "experts each time; flow on GPUs."
    ),
]
_MaxBytesPerS = Annotated[
    int | None, typer.Option(help="Most bytes a second that a rank sends and receives.")
]
_MaxBytesPerStep = Annotated[
    int | None, typer.Option(help="Most bytes that a step brings into a rank's slots.")
]
_MaxLayersPerStep = Annotated[int | None, typer.Option(help="Most layers that a step commits.")]
_Seed = Annotated[int, typer.Option(help="Of the load.")]
_Timeout = Annotated[float, typer.Option(help="Longest wait for another rank, in s.")]


def bench_stall(
    device: _DeviceOption = Device.AUTO,
    ranks: _Ranks = 2,
    layers: _Layers = 58,
    slots: _Slots = None,
    expert_bytes: _ExpertBytes = None,
    step_ms: _StepMs = None,
    launch: _LaunchOption = Launch.GRAPH,
    steps: _Steps = None,
    communicator: _Communicator = None,
    policy: _Policy = None,
    max_bytes_per_s: _MaxBytesPerS = None,
    max_bytes_per_step: _MaxBytesPerStep = None,
    max_layers_per_step: _MaxLayersPerStep = None,
    seed: _Seed = 0,
    timeout: _Timeout = 60.0,
    json_path: JsonPath = None,
) -> None:
    """Compare step times with rebalances in the background and without, in one run."""
    check_json_path(json_path)
    bounds = {
        "--max-bytes-per-s": max_bytes_per_s,
        "--max-bytes-per-step": max_bytes_per_step,
        "--max-layers-per-step": max_layers_per_step,
    }
    check_least(*((flag, value, 1) for flag, value in bounds.items() if value is not None))
    import torch

    from equipoise.bench.stall import measure_stalls
    from equipoise.bench.stall_case import StallSpec
    from equipoise.comm.registry import check_name
    from equipoise.policy import get_policy

    on_gpus = device is Device.CUDA or (device is Device.AUTO and torch.cuda.device_count() >= 2)
    given: dict[str, Any] = {
        "num_ranks": ranks,
        "num_layers": layers,
        "slots_per_rank": slots,
        "expert_bytes": expert_bytes,
        "step_ms": step_ms,
        "launch": launch.value,
        "num_steps": steps,
        "communicator": communicator,
        "policy": policy,
        "max_bytes_per_s": max_bytes_per_s,
        "max_bytes_per_step": max_bytes_per_step,
        "max_layers_per_step": max_layers_per_step,
        "seed": seed,
        "timeout_s": timeout,
    }
    if communicator is not None:
        check_name(communicator)
    if policy is not None:
        get_policy(policy)
    usual = StallSpec.on_gpus() if on_gpus else StallSpec()
    chosen = {name: value for name, value in given.items() if value is not None}
    show_outcome(measure_stalls(dataclasses.replace(usual, **chosen)), _COLUMNS, json_path)
