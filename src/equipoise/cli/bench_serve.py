"""`equipoise bench serve`: what HTTP costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from equipoise.cli.bench import JsonPath, check_json_path, show_outcome
from equipoise.errors import ConfigError

if TYPE_CHECKING:
    from equipoise.elastic.service import Service

_COLUMNS = (
    ("case", "case"),
    ("alone, tokens/s", "alone_tokens_per_s"),
    ("HTTP, tokens/s", "http_tokens_per_s"),
    ("overhead", "overhead"),
    ("least", "overhead_least"),
    ("most", "overhead_most"),
    ("goal", "goal"),
    ("met", "met"),
)


def bench_serve(
    ranks: Annotated[int, typer.Option(help="Processes that share the experts.")] = 1,
    streams: Annotated[int, typer.Option(help="Requests at once.")] = 32,
    tokens: Annotated[int, typer.Option(help="Of each answer.")] = 128,
    rounds: Annotated[int, typer.Option(help="With HTTP and without, in turns.")] = 5,
    json_path: JsonPath = None,
) -> None:
    """Compare tokens per second by HTTP with those of the service alone, on the bundled model."""
    check_json_path(json_path)
    from equipoise.bundled import model_directory
    from equipoise.cli.serve_start import check_packages
    from equipoise.elastic.spec import ServiceSpec

    check_packages()
    from equipoise.elastic.controller import Controller
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

    outcome = measure_overhead(
        make_service, OverheadSpec(streams, tokens, rounds), {"ranks": ranks, "model": "bundled"}
    )
    show_outcome(outcome, _COLUMNS, json_path)
