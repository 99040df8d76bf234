"""The options of `equipoise serve`: as typer reads them, and what belongs together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import typer

DEFAULT_MAX_LEN = 1024
LauncherName = Literal["local", "torchrun", "ray"]
_HTTP, _LIMITS, _RANKS, _BALANCING, _RAY = "HTTP", "Limits", "Ranks", "Balancing", "Ray"

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[MODEL]", help="Checkpoint directory.  [the bundled model]"),
]
DType = Annotated[
    Literal["float32", "bfloat16", "float16"], typer.Option("--dtype", help="Of the weights.")
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option("--device", help="Of the ranks.")]

Host = Annotated[
    str,
    typer.Option(
        "--host",
        help="Address or interface; beyond this machine keys are needed.",
        rich_help_panel=_HTTP,
    ),
]
Port = Annotated[int, typer.Option("--port", help="0 takes a free one.", rich_help_panel=_HTTP)]
Name = Annotated[
    str | None, typer.Option("--name", help="Of the model, for clients.", rich_help_panel=_HTTP)
]
Log = Annotated[
    Path | None,
    typer.Option("--log", "--log-file", help="File for the log.  [stderr]", rich_help_panel=_HTTP),
]
LogPrompts = Annotated[
    bool, typer.Option("--log-prompts", help="Texts in it too.", rich_help_panel=_HTTP)
]
LogHealth = Annotated[
    bool,
    typer.Option("--log-health", help="Requests to /health in it too.", rich_help_panel=_HTTP),
]

BatchSize = Annotated[
    int,
    typer.Option("--batch-size", help="Requests in flight per rank.", rich_help_panel=_LIMITS),
]
MaxLen = Annotated[
    int | None,
    typer.Option(
        "--max-len",
        help=f"Tokens of a request with its answer.  [{DEFAULT_MAX_LEN}, or the model's]",
        rich_help_panel=_LIMITS,
    ),
]
Queue = Annotated[
    int, typer.Option("--queue", help="Requests that may wait.", rich_help_panel=_LIMITS)
]
MaxBody = Annotated[
    int, typer.Option("--max-body", help="Bytes of a request.", rich_help_panel=_LIMITS)
]
RequestTimeout = Annotated[
    float, typer.Option("--request-timeout", help="Longest answer, in s.", rich_help_panel=_LIMITS)
]
DrainTimeout = Annotated[
    float,
    typer.Option(
        "--drain-timeout",
        help="For requests in flight at the end, in s.",
        rich_help_panel=_LIMITS,
    ),
]
Timeout = Annotated[
    float,
    typer.Option(
        "--timeout", help="Longest wait of ranks for each other, in s.", rich_help_panel=_LIMITS
    ),
]

NumRanks = Annotated[
    int | None,
    typer.Option(
        "--ranks",
        help="Processes that share the experts.  [2; as many as torchrun started]",
        rich_help_panel=_RANKS,
    ),
]
Launcher = Annotated[
    LauncherName | None,
    typer.Option(
        "--launcher",
        help="Starts ranks.  [local; torchrun in its processes]",
        rich_help_panel=_RANKS,
    ),
]
Interface = Annotated[
    str | None,
    typer.Option(
        "--interface",
        help="Address or interface on which ranks meet.  [by the launcher]",
        rich_help_panel=_RANKS,
    ),
]
Socket = Annotated[
    Path | None,
    typer.Option(
        "--socket",
        help="For `equipoise scale` and others.  [of this process]",
        rich_help_panel=_RANKS,
    ),
]
State = Annotated[
    Path | None,
    typer.Option(
        "--state",
        help="File by which a server that is started again finds its ranks.",
        rich_help_panel=_RANKS,
    ),
]
Orphan = Annotated[
    float | None,
    typer.Option(
        "--orphan",
        help="Until ranks without a server end, in s.  [60 with --state, 10 without]",
        rich_help_panel=_RANKS,
    ),
]
SlotsPerRank = Annotated[
    int | None,
    typer.Option(
        "--slots-per-rank", help="The same at any number of ranks.", rich_help_panel=_RANKS
    ),
]
Respawn = Annotated[
    bool, typer.Option("--respawn", help="Replace ranks that died.", rich_help_panel=_RANKS)
]
Silence = Annotated[
    float,
    typer.Option(
        "--silence", help="Until a silent rank is given up, in s.", rich_help_panel=_RANKS
    ),
]

RayAddress = Annotated[
    str,
    typer.Option(
        "--ray-address", help="HOST:PORT of the cluster.  [this machine's]", rich_help_panel=_RAY
    ),
]
RayPlace = Annotated[
    Literal["spread", "pack"],
    typer.Option(
        "--ray-place", help="Newcomers go where fewest ranks are, or most.", rich_help_panel=_RAY
    ),
]
RayCpus = Annotated[
    float, typer.Option("--ray-cpus", help="CPUs that a rank takes.", rich_help_panel=_RAY)
]
RayWait = Annotated[
    float,
    typer.Option("--ray-wait", help="Longest wait for room, in s.", rich_help_panel=_RAY),
]

RedundantExperts = Annotated[
    str | None,
    typer.Option("--redundant-experts", help="auto, or a number.", rich_help_panel=_BALANCING),
]
Policy = Annotated[
    str | None,
    typer.Option("--policy", help="See `equipoise policies`.", rich_help_panel=_BALANCING),
]
StepInterval = Annotated[
    int | None,
    typer.Option("--step-interval", help="Steps between plans.", rich_help_panel=_BALANCING),
]
Sync = Annotated[
    bool, typer.Option("--sync", help="Not in the background.", rich_help_panel=_BALANCING)
]
NoBalance = Annotated[
    bool, typer.Option("--no-balance", help="Make no plans.", rich_help_panel=_BALANCING)
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="File of options.", rich_help_panel=_BALANCING)
]
EplbConfig = Annotated[
    str | None,
    typer.Option(
        "--eplb-config",
        help="JSON of options; or --eplb-config.OPTION VALUE.",
        rich_help_panel=_BALANCING,
    ),
]


class Http(NamedTuple):
    """Where is served, and what of it is logged."""

    host: str
    port: int
    name: str | None
    log: Path | None
    log_prompts: bool
    log_health: bool


class Limits(NamedTuple):
    """How much, and how long."""

    batch_size: int
    max_len: int | None
    queue: int
    max_body: int
    request_timeout: float
    drain_timeout: float
    timeout: float


class Ranks(NamedTuple):
    """Who serves."""

    number: int | None
    launcher: LauncherName | None
    interface: str | None
    socket: Path | None
    state: Path | None
    orphan: float | None
    slots_per_rank: int | None
    respawn: bool
    silence: float


class Ray(NamedTuple):
    """Where on a cluster."""

    address: str
    place: Literal["spread", "pack"]
    cpus: float
    wait: float


class Balancing(NamedTuple):
    """How experts are balanced."""

    redundant_experts: str | None
    policy: str | None
    step_interval: int | None
    sync: bool
    no_balance: bool
    config: Path | None
    eplb_config: str | None
