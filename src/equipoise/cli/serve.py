"""`equipoise serve`: requests over HTTP."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import typer

from equipoise.cli.config import list_options
from equipoise.config_sources import add_flag, parse_flags, resolve_config
from equipoise.errors import ConfigError, DependencyError

if TYPE_CHECKING:
    from equipoise.elastic.service import Service
    from equipoise.elastic.spec import ServiceSpec
    from equipoise.server.settings import ServerSettings

DEFAULT_MAX_LEN = 1024
BUNDLED_NAME = "equipoise-small"
_PACKAGES = ("fastapi", "uvicorn", "httptools", "prometheus_client", "transformers")
_HTTP, _LIMITS, _RANKS, _BALANCING = "HTTP", "Limits", "Ranks", "Balancing"


def serve(
    context: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]", help="Checkpoint directory.  [the bundled model]"),
    ] = None,
    ranks: Annotated[int, typer.Option(help="Processes that share the experts.")] = 2,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the weights.")
    ] = "float32",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Of the ranks.")] = "auto",
    host: Annotated[
        str,
        typer.Option(help="Address; beyond this machine keys are needed.", rich_help_panel=_HTTP),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", rich_help_panel=_HTTP)] = 8000,
    name: Annotated[
        str | None, typer.Option(help="Of the model, for clients.", rich_help_panel=_HTTP)
    ] = None,
    log: Annotated[
        Path | None, typer.Option(help="File for the log.  [stderr]", rich_help_panel=_HTTP)
    ] = None,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Texts in it too.", rich_help_panel=_HTTP)
    ] = False,
    batch_size: Annotated[
        int, typer.Option(help="Requests in flight per rank.", rich_help_panel=_LIMITS)
    ] = 16,
    max_len: Annotated[
        int | None,
        typer.Option(
            help=f"Tokens of a request with its answer.  [{DEFAULT_MAX_LEN}, or the model's]",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    queue: Annotated[
        int, typer.Option(help="Requests that may wait.", rich_help_panel=_LIMITS)
    ] = 256,
    max_body: Annotated[int, typer.Option(help="Bytes of a request.", rich_help_panel=_LIMITS)] = 1
    << 20,
    request_timeout: Annotated[
        float, typer.Option(help="Longest answer, in s.", rich_help_panel=_LIMITS)
    ] = 600.0,
    drain_timeout: Annotated[
        float,
        typer.Option(help="For requests in flight at the end, in s.", rich_help_panel=_LIMITS),
    ] = 30.0,
    timeout: Annotated[
        float,
        typer.Option(help="Longest wait of ranks for each other, in s.", rich_help_panel=_LIMITS),
    ] = 30.0,
    socket: Annotated[
        Path | None,
        typer.Option(
            help="For `equipoise scale` and others.  [of this process]", rich_help_panel=_RANKS
        ),
    ] = None,
    slots_per_rank: Annotated[
        int | None,
        typer.Option(help="The same at any number of ranks.", rich_help_panel=_RANKS),
    ] = None,
    respawn: Annotated[
        bool, typer.Option("--respawn", help="Replace ranks that died.", rich_help_panel=_RANKS)
    ] = False,
    silence: Annotated[
        float,
        typer.Option(help="Until a silent rank is given up, in s.", rich_help_panel=_RANKS),
    ] = 10.0,
    redundant_experts: Annotated[
        str | None, typer.Option(help="auto, or a number.", rich_help_panel=_BALANCING)
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="See `equipoise policies`.", rich_help_panel=_BALANCING)
    ] = None,
    step_interval: Annotated[
        int | None, typer.Option(help="Steps between plans.", rich_help_panel=_BALANCING)
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="File of options.", rich_help_panel=_BALANCING)
    ] = None,
    eplb_config: Annotated[
        str | None,
        typer.Option(
            help="JSON of options; or --eplb-config.OPTION VALUE.", rich_help_panel=_BALANCING
        ),
    ] = None,
) -> None:
    """Serve a model over HTTP, as OpenAI's clients expect it, on ranks that may come and go.

    Keys are read from EQ_API_KEY and EQ_ADMIN_KEY, or from the files that EQ_API_KEY_FILE and
    EQ_ADMIN_KEY_FILE name. The log has a line of JSON for each request. SIGTERM lets requests in
    flight finish.
    """
    check_packages()
    from equipoise.server.settings import ServerLimits, ServerSettings, read_keys

    model, extra = _find_model([*(words or ()), *context.args])
    flags = parse_flags(eplb_config, extra, known=list_options(context))
    for key, flag, value in (
        ("num_redundant_experts", "--redundant-experts", _parse_redundant(redundant_experts)),
        ("policy", "--policy", policy),
        ("step_interval", "--step-interval", step_interval),
    ):
        if value is not None:
            add_flag(flags, key, flag, value)
    settings = ServerSettings(
        host=host,
        port=port,
        keys=read_keys(os.environ),
        limits=ServerLimits(
            body_bytes=max_body, request_timeout_s=request_timeout, drain_timeout_s=drain_timeout
        ),
        model_name=name or (BUNDLED_NAME if model is None else None),
        log_prompts=log_prompts,
    )
    spec = _make_spec(
        model,
        max_len,
        {
            "num_ranks": ranks,
            "config": resolve_config(file=config, flags=flags).config,
            "dtype": dtype,
            "device": _find_device(device),
            "max_batch_size": batch_size,
            "queue_limit": queue,
            "timeout_s": timeout,
            "slots_per_rank": slots_per_rank,
            "respawn": respawn,
            "silence_s": silence,
        },
    )
    _serve(spec, settings, log, socket)


def _find_model(words: list[str]) -> tuple[Path | None, list[str]]:
    """The model among words that no option took, and the others: options that typer knows not."""
    model: Path | None = None
    extra: list[str] = []
    left = iter(words)
    for word in left:
        if word.startswith("--eplb-config.") and "=" not in word:
            extra += [word, *itertools.islice(left, 1)]
        elif word.startswith("-") or model is not None:
            extra.append(word)
        else:
            model = Path(word)
    return model, extra


def check_packages() -> None:
    """Refuse to serve without what serving needs.

    Raises: DependencyError.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise DependencyError(
            f"serving needs {', '.join(missing)}: pip install 'equipoise[hf,server]'"
        )


def _make_spec(model: Path | None, max_len: int | None, values: dict[str, Any]) -> ServiceSpec:
    """Check all that can be checked before a rank starts."""
    from equipoise.bundled import model_directory
    from equipoise.elastic.spec import ServiceSpec
    from equipoise.models.families import check_weights, read_model_shape
    from equipoise.policy import find_policy
    from equipoise.topology import choose_num_redundant

    directory = model or model_directory()
    shape = read_model_shape(directory)
    check_weights(directory)
    find_policy(values["config"].policy)
    longest = _read_longest(directory)
    if max_len is None:
        max_len = min(DEFAULT_MAX_LEN, longest or DEFAULT_MAX_LEN)
    elif longest is not None and max_len > longest:
        raise ConfigError(f"--max-len {max_len}: the model takes {longest} tokens")
    spec = ServiceSpec(model=directory, max_len=max_len, **values)
    requested = spec.config.num_redundant_experts
    choose_num_redundant(
        shape.num_experts, spec.num_ranks, None if requested == "auto" else requested
    )
    return spec


def _parse_redundant(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.lstrip("-").isdecimal() else text


def _find_device(asked: str) -> str:
    if asked == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if asked == "cuda":
        raise ConfigError("--device cuda: torch sees no CUDA device here; use --device cpu")
    return "cpu"


def _read_longest(directory: Path) -> int | None:
    from equipoise.models.families import read_config

    longest = read_config(directory).get("max_position_embeddings")
    return longest if isinstance(longest, int) else None


def _serve(
    spec: ServiceSpec, settings: ServerSettings, log: Path | None, socket: Path | None
) -> None:
    from equipoise.elastic.control import ControlSocket
    from equipoise.elastic.controller import Controller
    from equipoise.launch.processes import LocalLauncher
    from equipoise.server.serving import HttpServer

    made: list[Controller] = []

    def make_service() -> Service:
        controller = Controller(spec, launcher)
        made.append(controller)
        controller.start()
        try:
            closing.callback(ControlSocket(controller, socket).close)
        except BaseException:
            controller.close()
            raise
        return controller

    def give_up() -> None:
        for controller in made:
            controller.close()

    def tell(service: Service) -> None:
        typer.echo(f"serving {settings.model_name or service.facts.name} at {server.url}")

    with _open_log(log) as stream, ExitStack() as closing:
        server = HttpServer(settings, stream)
        # Before there are threads: what ranks come from is loaded meanwhile.
        launcher = LocalLauncher(spec.device, spec.model)
        ranks = "1 rank" if spec.num_ranks == 1 else f"{spec.num_ranks} ranks"
        typer.echo(f"loading {spec.model} on {ranks}")
        drained = server.run(make_service, tell, give_up)
    if not drained:
        typer.echo("equipoise: ended with requests unfinished", err=True)
        raise typer.Exit(1)


@contextmanager
def _open_log(path: Path | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stderr
        return
    try:
        stream = path.open("a", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--log {path}: cannot be written: {error.strerror}") from error
    with stream:
        yield stream
