"""`equipoise bench serve`: what HTTP costs, and what clients see of changes and deaths."""

from __future__ import annotations

import signal
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from equipoise.cli.bench import JsonPath, check_json_path, read_sizes, show_outcome
from equipoise.cli.config import list_given
from equipoise.errors import ConfigError

if TYPE_CHECKING:
    from equipoise.bench.outcome import BenchOutcome
    from equipoise.elastic.service import Service

Case = Literal["overhead", "scale", "kill"]
_SIZES = {"scale": "2,4,3,5,2", "kill": "3"}
_OVERHEAD_COLUMNS = (
    ("case", "case"),
    ("alone, tokens/s", "alone_tokens_per_s"),
    ("HTTP, tokens/s", "http_tokens_per_s"),
    ("overhead", "overhead"),
    ("least", "overhead_least"),
    ("most", "overhead_most"),
    ("goal", "goal"),
    ("met", "met"),
)
_TRAFFIC_COLUMNS = (
    ("what", "what"),
    ("value", "value"),
    ("unit", "unit"),
    ("median", "median_ms"),
    ("longest", "longest_ms"),
    ("goal", "goal"),
    ("met", "met"),
)
TERMINATED = 143
_OVERHEAD, _TRAFFIC = "Overhead", "Scale and kill"


def bench_serve(
    context: typer.Context,
    case: Annotated[
        Case, typer.Option(help="HTTP's overhead; or ranks that come and go, or are killed.")
    ] = "overhead",
    ranks: Annotated[
        int, typer.Option(help="Processes that share the experts.", rich_help_panel=_OVERHEAD)
    ] = 1,
    streams: Annotated[int, typer.Option(help="Requests at once.", rich_help_panel=_OVERHEAD)] = 32,
    rounds: Annotated[
        int, typer.Option(help="With HTTP and without, in turns.", rich_help_panel=_OVERHEAD)
    ] = 5,
    tokens: Annotated[int | None, typer.Option(help="Of each answer.  [128; 16]")] = None,
    sizes: Annotated[
        str | None,
        typer.Option(help="Numbers of ranks.  [2,4,3,5,2; 3]", rich_help_panel=_TRAFFIC),
    ] = None,
    requests: Annotated[int, typer.Option(help="At least.", rich_help_panel=_TRAFFIC)] = 2000,
    clients: Annotated[int, typer.Option(help="At once.", rich_help_panel=_TRAFFIC)] = 16,
    kills: Annotated[int, typer.Option(help="Deaths.", rich_help_panel=_TRAFFIC)] = 5,
    every: Annotated[
        float, typer.Option(help="Seconds between two, at least.", rich_help_panel=_TRAFFIC)
    ] = 20.0,
    launcher: Annotated[
        Literal["local", "ray"], typer.Option(help="Starts ranks.", rich_help_panel=_TRAFFIC)
    ] = "local",
    ray_address: Annotated[
        str, typer.Option(help="HOST:PORT of a cluster.", rich_help_panel=_TRAFFIC)
    ] = "auto",
    json_path: JsonPath = None,
) -> None:
    """Measure a server of the bundled model: by itself, and while its ranks change or die."""
    check_json_path(json_path)
    from equipoise.cli.serve_start import check_packages

    check_packages()
    _refuse_what_others_take(context, case)
    if case == "overhead":
        outcome = _measure_overhead(ranks, streams, 128 if tokens is None else tokens, rounds)
        show_outcome(outcome, _OVERHEAD_COLUMNS, json_path)
        return
    # So that the server, a process of its own, is ended too.
    signal.signal(signal.SIGTERM, _stop)
    from equipoise.server.traffic import TrafficSpec, measure_traffic

    on_ray = ("--launcher=ray", f"--ray-address={ray_address}") if launcher == "ray" else ()
    spec = TrafficSpec(
        case=case,
        sizes=read_sizes(sizes or _SIZES[case]),
        num_kills=kills,
        every_s=every,
        num_requests=requests,
        num_clients=clients,
        num_tokens=16 if tokens is None else tokens,
        options=on_ray,
    )
    outcome = measure_traffic(spec, lambda text: typer.echo(text, err=True))
    show_outcome(outcome, _TRAFFIC_COLUMNS, json_path)


def _refuse_what_others_take(context: typer.Context, case: Case) -> None:
    """Options of another case would do nothing."""
    others = _TRAFFIC if case == "overhead" else _OVERHEAD
    for option in list_given(context):
        if getattr(option, "rich_help_panel", None) == others:
            raise ConfigError(f"{option.opts[0]} is not for --case {case}")


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise typer.Exit(TERMINATED)


def _measure_overhead(ranks: int, streams: int, tokens: int, rounds: int) -> BenchOutcome:
    from equipoise.bundled import model_directory
    from equipoise.elastic.controller import Controller
    from equipoise.elastic.spec import ServiceSpec
    from equipoise.launch.processes import LocalLauncher
    from equipoise.server.overhead import PROMPT, OverheadSpec, measure_overhead

    for flag, value in (("--streams", streams), ("--tokens", tokens), ("--rounds", rounds)):
        if value < 1:
            raise ConfigError(f"{flag} must be at least 1, got {value}")
    spec = ServiceSpec(
        model=model_directory(),
        num_ranks=ranks,
        max_batch_size=-(-streams // max(ranks, 1)),
        max_len=len(PROMPT) + tokens,
    )
    launcher = LocalLauncher(spec.device, spec.model)

    def make_service() -> Service:
        controller = Controller(spec, launcher)
        controller.start()
        return controller

    return measure_overhead(
        make_service, OverheadSpec(streams, tokens, rounds), {"ranks": ranks, "model": "bundled"}
    )
