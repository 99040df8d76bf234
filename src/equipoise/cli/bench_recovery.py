"""`equipoise bench recovery`: ranks are killed under a constant stream of requests."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import typer

from equipoise.cli import stream_options as options
from equipoise.cli.bench import JsonPath, check_json_path, show_outcome
from equipoise.errors import ConfigError

_COLUMNS = (
    ("what", "what"),
    ("value", "value"),
    ("unit", "unit"),
    ("noticed, s", "noticed_s"),
    ("switched, s", "switched_s"),
    ("full, s", "full_s"),
    ("goal", "goal"),
    ("met", "met"),
)


def bench_recovery(
    ranks: Annotated[int, typer.Option(help="That serve, and again after each death.")] = 4,
    kills: Annotated[int, typer.Option(help="Ranks that are killed, in turn.")] = 5,
    every: Annotated[float, typer.Option(help="Seconds between two kills, at least.")] = 15.0,
    requests: options.Requests = 1000,
    in_flight: options.InFlight = 32,
    new_tokens: options.NewTokens = 8,
    model: options.Model = None,
    device: options.Device = "cpu",
    timeout: options.Timeout = 30.0,
    seed: Annotated[int, typer.Option(help="Of the prompts, and of who is killed.")] = 0,
    host_backup: Annotated[
        Literal["none", "unreplicated", "all"],
        typer.Option(help="Experts that ranks keep in host memory."),
    ] = "none",
    respawn: Annotated[bool, typer.Option(help="Replace each rank that was killed.")] = True,
    size_gb: options.SizeGb = None,
    json_path: JsonPath = None,
) -> None:
    """Kill ranks under load: how long no token comes, and whether any answer suffers."""
    check_json_path(json_path)
    from equipoise.bench.recovery import RecoveryBench, measure_recovery

    bench = RecoveryBench(
        num_ranks=ranks,
        num_kills=kills,
        every_s=every,
        num_requests=requests,
        num_in_flight=in_flight,
        num_new_tokens=new_tokens,
        model=model,
        device=device,
        timeout_s=timeout,
        seed=seed,
        host_backup=host_backup,
        respawn=respawn,
        size_gb=size_gb,
    )
    if not 0 <= every < math.inf:
        raise ConfigError(f"--every must be a number from 0 on, got {every}")
    options.check(requests, in_flight, new_tokens, timeout, size_gb, model, device)
    show_outcome(measure_recovery(bench, _say), _COLUMNS, json_path)


def _say(text: str) -> None:
    typer.echo(text, err=True)
