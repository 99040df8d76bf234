"""`equipoise bench elastic`: ranks come and go under a constant stream of requests."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from equipoise.cli import stream_options as options
from equipoise.cli.bench import JsonPath, check_json_path, read_sizes, show_outcome

_COLUMNS = (
    ("what", "what"),
    ("value", "value"),
    ("unit", "unit"),
    ("pause ms", "pause_ms"),
    ("expected ms", "expected_ms"),
    ("step ms", "step_ms"),
    ("of link", "of_link"),
    ("goal", "goal"),
    ("met", "met"),
)


def bench_elastic(
    sizes: Annotated[str, typer.Option(help="Numbers of ranks, in turn.")] = "2,4,2,3,5,2",
    requests: options.Requests = 2000,
    in_flight: options.InFlight = 32,
    new_tokens: options.NewTokens = 8,
    model: options.Model = None,
    device: options.Device = "cpu",
    dispatch: Annotated[
        Literal["torch", "nixl_ep"],
        typer.Option(help="What tokens travel by; nixl_ep is for GPUs, and bfloat16."),
    ] = "torch",
    timeout: options.Timeout = 30.0,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    size_gb: options.SizeGb = None,
    json_path: JsonPath = None,
) -> None:
    """Change the number of ranks under load: what it costs, and whether any answer suffers."""
    check_json_path(json_path)
    from equipoise.bench.elastic import ElasticBench, measure_elastic

    bench = ElasticBench(
        sizes=read_sizes(sizes),
        num_requests=requests,
        num_in_flight=in_flight,
        num_new_tokens=new_tokens,
        model=model,
        device=device,
        dispatch=dispatch,
        timeout_s=timeout,
        seed=seed,
        size_gb=size_gb,
    )
    options.check(requests, in_flight, new_tokens, timeout, size_gb, model, device)
    show_outcome(measure_elastic(bench, _say), _COLUMNS, json_path)


def _say(text: str) -> None:
    typer.echo(text, err=True)
