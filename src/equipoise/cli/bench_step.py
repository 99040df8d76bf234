"""`equipoise bench step`: steps of the engine, skewed against balanced load."""

from __future__ import annotations

import time
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from equipoise.cli.bench import JsonPath, check_json_path, show_outcome
from equipoise.cli.bench_transfer import Device, count_gpus
from equipoise.config_sources import parse_flags, resolve_config
from equipoise.errors import ConfigError

if TYPE_CHECKING:
    from equipoise.bench.step_case import StepSaid
    from equipoise.config import EPLBConfig

_OWN = {"window_size": "", "step_interval": "", "communicator": ": see --communicator"}
_SIZES = ("prefill_tokens", "decode_size", "num_steps", "num_stall_steps")
_ON_GPUS = MappingProxyType(
    {
        "prefill_tokens": 4096,
        "prompt_len": 512,
        "decode_size": 64,
        "num_steps": 150,
        "num_stall_steps": 2000,
    }
)
_COLUMNS = (
    ("case", "case"),
    ("what", "what"),
    ("tokens/s", "tokens_per_s"),
    ("p50 s", "p50_s"),
    ("p99 s", "p99_s"),
    ("imbalance", "imbalance"),
    ("value", "value"),
    ("goal", "goal"),
    ("met", "met"),
)


def bench_step(
    device: Annotated[Device, typer.Option(help="auto: on GPUs if there are two.")] = Device.AUTO,
    ranks: Annotated[
        int, typer.Option(help="Processes, at least 2; on GPUs they take turns over them.")
    ] = 2,
    case: Annotated[
        list[str] | None,
        typer.Option(help="prefill, decode, recorder, stall or graphs; may be repeated."),
    ] = None,
    kind: Annotated[
        str, typer.Option(help="Of text, of the bundled trace: gpqa_main, mmlu_test, ...")
    ] = "gpqa_main",
    layers: Annotated[int | None, typer.Option(help="Layers; 4 on the CPU, 24 on GPUs.")] = None,
    prefill_tokens: Annotated[
        int | None, typer.Option(help="Of prompts, per rank and step; 512, on GPUs 4,096.")
    ] = None,
    sequences: Annotated[
        int | None, typer.Option(help="That decode, per rank; 16, on GPUs 64.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Of each kind in a case; 40, on GPUs 150.")
    ] = None,
    stall_steps: Annotated[
        int | None, typer.Option(help="The same, beside rebalances; 200, on GPUs 2,000.")
    ] = None,
    dispatcher: Annotated[
        str, typer.Option(help="What tokens travel by: torch, or nixl_ep on GPUs.")
    ] = "torch",
    communicator: Annotated[str, typer.Option(help="Wire for weights.")] = "auto",
    eplb_config: Annotated[
        str | None,
        typer.Option(help="JSON of options of balancing, for rebalances back to back."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, tokens and routes.")] = 0,
    timeout: Annotated[float, typer.Option(help="Longest wait for another rank, in s.")] = 60.0,
    json_path: JsonPath = None,
) -> None:
    """Compare steps on skewed and on balanced load, and beside rebalances."""
    check_json_path(json_path)
    from equipoise.bench.step import compare_steps
    from equipoise.bench.step_case import CASES, StepSpec
    from equipoise.comm.registry import check_name

    check_name(communicator)
    spec = StepSpec(
        kind=kind,
        num_ranks=ranks,
        cases=tuple(case or CASES),  # type: ignore[arg-type]
        dispatcher=dispatcher,
        communicator=communicator,
        balancing=_read_options(eplb_config),
        seed=seed,
        timeout_s=timeout,
        **_fit(device, layers, (prefill_tokens, sequences, steps, stall_steps)),
    )
    show_outcome(compare_steps(spec, _say_done), _COLUMNS, json_path)


def _fit(device: Device, layers: int | None, given: tuple[int | None, ...]) -> dict[str, Any]:
    """What depends on the device, unless it was given, in the order of _SIZES."""
    from equipoise.bench.step_case import BUNDLED, SCALED

    on_gpus = device is Device.CUDA or (device is Device.AUTO and count_gpus() >= 2)
    size = SCALED if on_gpus else BUNDLED
    return {
        "size": size if layers is None else replace(size, num_layers=layers),
        "device": "cuda" if on_gpus else "cpu",
        **(_ON_GPUS if on_gpus else {}),
        **{name: value for name, value in zip(_SIZES, given, strict=True) if value is not None},
    }


def _read_options(eplb_config: str | None) -> EPLBConfig:
    flags = parse_flags(eplb_config, [])
    for key, flag in _OWN.items():
        if key in flags:
            raise ConfigError(f"--eplb-config: {key} is the bench's own{flag}")
    return resolve_config(environment={}, flags=flags).config


def _say_done(said: StepSaid) -> None:
    """Cases take a while, and a run that is cut short shall have told something."""
    import numpy as np

    from equipoise.bench.step_case import Compared, Setting

    what: str = "the model is there" if isinstance(said, Setting) else said.case
    if isinstance(said, Compared):
        off, on = (np.percentile(timed.step_s, (50, 99)) * 1e3 for timed in (said.off, said.on))
        what += f": a step takes {off[0]:.4g} ms without, {on[0]:.4g} ms with"
        what += f"; p99 {off[1]:.4g} and {on[1]:.4g}"
    typer.echo(f"{time.strftime('%H:%M:%S')} {what}", err=True)
