"""`equipoise bench plan`: what `flow` reaches, against bounds and against `deepseek`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from equipoise.cli.bench import JsonPath, check_json_path, show_outcome
from equipoise.errors import ConfigError

if TYPE_CHECKING:
    from equipoise.bench.outcome import BenchOutcome
    from equipoise.bench.plan import PlanSpec
    from equipoise.load.trace import LoadTrace

_COLUMNS = (
    ("case", "case"),
    ("load", "load"),
    ("what", "what"),
    ("value", "value"),
    ("goal", "goal"),
    ("met", "met"),
    ("bound", "bound"),
    ("deepseek", "deepseek"),
    ("received (matched)", "received_said"),
    ("deepseek's", "deepseek_received_said"),
)
QUICK_SHAPES = ("EP32", "EP144")


def bench_plan(
    shape: Annotated[
        list[str] | None,
        typer.Option(help="EP32, Qwen, EP64, Kimi, EP144, EP256, R1000; may be repeated."),
    ] = None,
    load: Annotated[
        list[str] | None,
        typer.Option(help="zipf, lognormal, dirichlet, or trace, a bundled one; may be repeated."),
    ] = None,
    trace: Annotated[
        list[Path] | None,
        typer.Option(help="Real load of your own, resampled to each shape; may be repeated."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    drift: Annotated[bool, typer.Option(help="Plan from standing placements too.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="EP32 and EP144 only.")] = False,
    json_path: JsonPath = None,
) -> None:
    """Compare placements with their bounds, and with the published algorithm's, in one run."""
    check_json_path(json_path)
    from equipoise.bench.plan import LOAD_KINDS, PlanSpec
    from equipoise.bench.plan_loads import SHAPES
    from equipoise.bundled.traces import gptoss_routes
    from equipoise.load.trace_files import read_trace

    known = (*LOAD_KINDS, "trace")
    kinds = tuple(dict.fromkeys(load or known))
    for kind in kinds:
        if kind not in known:
            raise ConfigError(f"--load: there is no load {kind!r}: there are {', '.join(known)}")
    traces: dict[str, LoadTrace] = {}
    if "trace" in kinds:
        traces["gpt-oss-20b"] = read_trace(gptoss_routes())
    for path in trace or ():
        traces[path.stem if path.stem not in traces else str(path)] = read_trace(path)
    if quick and shape:
        raise ConfigError("--quick chooses the shapes: leave out --shape")
    names = shape or (QUICK_SHAPES if quick else SHAPES)
    spec = PlanSpec(
        shapes=tuple(dict.fromkeys(names)),
        load_kinds=tuple(kind for kind in LOAD_KINDS if kind in kinds),
        traces=traces,
        seed=seed,
        drift=drift,
    )
    show_outcome(_compare(spec), _COLUMNS, json_path)


def _compare(spec: PlanSpec) -> BenchOutcome:
    from rich.console import Console
    from rich.progress import Progress

    from equipoise.bench.plan import compare_plans

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def tell(name: str, done: int, total: int) -> None:
            bar.update(task, description=name, completed=done, total=total)

        return compare_plans(spec, tell)
