"""From the options of `equipoise serve` to a server that serves, whatever starts its ranks."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

import typer

from equipoise.cli.config import add_switches, list_given, list_options, parse_redundant
from equipoise.cli.devices import find_device
from equipoise.cli.serve_options import (
    DEFAULT_MAX_LEN,
    Balancing,
    Http,
    LauncherName,
    Limits,
    Ranks,
    Ray,
)
from equipoise.config_sources import add_flag, parse_flags, resolve_config
from equipoise.errors import ConfigError, DependencyError, EquipoiseError

if TYPE_CHECKING:
    from equipoise.config import EPLBConfig
    from equipoise.elastic.launcher import Launcher
    from equipoise.elastic.service import Service
    from equipoise.elastic.spec import ServiceSpec
    from equipoise.launch.failure import Failure
    from equipoise.launch.torchrun import TorchrunRank
    from equipoise.launch.torchrun_ranks import TorchrunLauncher
    from equipoise.server.settings import ServerSettings

BUNDLED_NAME = "equipoise-small"
DEFAULT_RANKS = 2
ORPHAN_S, DROPPED_S = 60.0, 10.0
"""How long ranks wait for another server, and for their own to answer again."""
_FLAGS = {
    "num_ranks": "--ranks",
    "max_batch_size": "--batch-size",
    "max_len": "--max-len",
    "queue_limit": "--queue",
    "slots_per_rank": "--slots-per-rank",
    "timeout_s": "--timeout",
    "silence_s": "--silence",
    "orphan_s": "--orphan",
    "body_bytes": "--max-body",
    "request_timeout_s": "--request-timeout",
    "drain_timeout_s": "--drain-timeout",
}
_PACKAGES = ("fastapi", "uvicorn", "httptools", "prometheus_client", "transformers")


def start(
    context: typer.Context,
    words: list[str],
    dtype: str,
    device: str,
    http: Http,
    limits: Limits,
    ranks: Ranks,
    ray: Ray,
    balancing: Balancing,
) -> None:
    """Serve until it is enough, as the options say.

    Raises: EquipoiseError, in one line; typer.Exit with a status.
    """
    # Until the server hears signals itself: imports take seconds, and nothing is in flight yet.
    signal.signal(signal.SIGTERM, _end_well)
    from equipoise.launch.torchrun import read_torchrun

    check_packages()
    model, extra = _find_model([*words, *context.args])
    place = read_torchrun(os.environ)
    launcher = _choose_launcher(ranks.launcher, place)
    _refuse_what_others_take(context, launcher, ranks.state)

    def settle() -> ServiceSpec:
        values = {
            "num_ranks": _count_ranks(ranks.number, place),
            "config": _resolve_config(balancing, extra, list_options(context)),
            "dtype": dtype,
            "device": _find_device(device, launcher),
            "max_batch_size": limits.batch_size,
            "queue_limit": limits.queue,
            "timeout_s": limits.timeout,
            "slots_per_rank": ranks.slots_per_rank,
            "respawn": ranks.respawn,
            "silence_s": ranks.silence,
            "orphan_s": _choose_orphan_s(ranks),
        }
        return _make_spec(model, limits.max_len, values)

    make_settings = partial(_make_settings, http, limits, is_bundled=model is None)
    if place is not None:
        _serve_by_torchrun(place, settle, make_settings, http.log, ranks, limits.timeout)
        return
    settings = make_settings()
    spec = settle()
    interface = None if ranks.interface is None else _find_address(ranks.interface)
    if launcher == "ray":
        from equipoise.launch.ray_cluster import RayLauncher, RayOptions

        options = RayOptions(ray.address, ray.place, ray.cpus, ray.wait)
        cluster = RayLauncher(spec.device, options)
        spec = replace(spec, interface=interface or cluster.interface)
        _serve(spec, settings, http.log, ranks, lambda: cluster)
    else:
        spec = replace(spec, interface=interface or spec.interface)
        _serve(spec, settings, http.log, ranks, lambda: _make_local(spec))


def _end_well(_number: int, _frame: FrameType | None) -> None:
    raise typer.Exit(0)


def _choose_launcher(asked: LauncherName | None, place: TorchrunRank | None) -> LauncherName:
    if asked == "torchrun" and place is None:
        raise ConfigError(
            "--launcher torchrun: this process is none of torchrun's: "
            "torchrun --nproc-per-node 2 -m equipoise serve"
        )
    if asked in ("local", "ray") and place is not None:
        raise ConfigError(f"--launcher {asked}: torchrun has started this process, and its ranks")
    return asked or ("local" if place is None else "torchrun")


def _refuse_what_others_take(
    context: typer.Context, launcher: LauncherName, state: Path | None
) -> None:
    """Options of another launcher would do nothing."""
    if state is not None and launcher != "local":
        raise ConfigError(f"--state is for ranks of this machine: with {launcher} they end too")
    if launcher == "ray":
        return
    for option in list_given(context):
        if option.opts[0].startswith("--ray-"):
            raise ConfigError(f"{option.opts[0]} is for --launcher ray")


def _choose_orphan_s(ranks: Ranks) -> float:
    """Whom no other server can find has only to bear that a connection drops."""
    if ranks.orphan is not None:
        return ranks.orphan
    return DROPPED_S if ranks.state is None else ORPHAN_S


def _count_ranks(asked: int | None, place: TorchrunRank | None) -> int:
    if place is None:
        return DEFAULT_RANKS if asked is None else asked
    if asked not in (None, place.size):
        raise ConfigError(
            f"--ranks {asked}, but torchrun started {place.size}: leave --ranks out, or start "
            f"{asked}"
        )
    return place.size


def _resolve_config(balancing: Balancing, extra: list[str], known: list[str]) -> EPLBConfig:
    flags = parse_flags(balancing.eplb_config, extra, known=known)
    for key, flag, value in (
        (
            "num_redundant_experts",
            "--redundant-experts",
            parse_redundant(balancing.redundant_experts),
        ),
        ("policy", "--policy", balancing.policy),
        ("step_interval", "--step-interval", balancing.step_interval),
    ):
        if value is not None:
            add_flag(flags, key, flag, value)
    add_switches(flags, sync=balancing.sync, no_balance=balancing.no_balance)
    return resolve_config(file=balancing.config, flags=flags).config


def _make_settings(http: Http, limits: Limits, *, is_bundled: bool) -> ServerSettings:
    from equipoise.elastic.interface import list_interfaces
    from equipoise.server.settings import ServerLimits, ServerSettings, read_keys

    with _named_by_flags():
        kept = ServerLimits(
            body_bytes=limits.max_body,
            request_timeout_s=limits.request_timeout,
            drain_timeout_s=limits.drain_timeout,
        )
    return ServerSettings(
        host=list_interfaces().get(http.host, http.host),
        port=http.port,
        keys=read_keys(os.environ),
        limits=kept,
        model_name=http.name or (BUNDLED_NAME if is_bundled else None),
        log_prompts=http.log_prompts,
        log_health=http.log_health,
    )


def _find_address(interface: str) -> str:
    from equipoise.elastic.interface import find_address

    return find_address(interface)


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


def _make_spec(model: Path | None, max_len: int | None, values: Mapping[str, Any]) -> ServiceSpec:
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
    with _named_by_flags():
        spec = ServiceSpec(model=directory, max_len=max_len, **values)
    requested = spec.config.num_redundant_experts
    choose_num_redundant(
        shape.num_experts, spec.num_ranks, None if requested == "auto" else requested
    )
    return spec


@contextmanager
def _named_by_flags() -> Iterator[None]:
    """Refusals speak of fields, and who reads them here has written options."""
    try:
        yield
    except ConfigError as error:
        name, space, rest = str(error).partition(" ")
        raise ConfigError(_FLAGS.get(name, name) + space + rest) from error


def _find_device(asked: str, launcher: LauncherName) -> str:
    # A cluster's GPUs need not be of this machine.
    return asked if launcher == "ray" and asked == "cuda" else find_device(asked)


def _read_longest(directory: Path) -> int | None:
    from equipoise.models.families import read_config

    longest = read_config(directory).get("max_position_embeddings")
    return longest if isinstance(longest, int) else None


def _make_local(spec: ServiceSpec) -> Launcher:
    from equipoise.launch.processes import LocalLauncher

    return LocalLauncher(spec.device, spec.model)


def _serve(
    spec: ServiceSpec,
    settings: ServerSettings,
    log: Path | None,
    ranks: Ranks,
    make_launcher: Callable[[], Launcher],
) -> None:
    """Serve until it is enough; the launcher is made once the port is known to be free."""
    from equipoise.elastic.control import ControlSocket
    from equipoise.elastic.controller import Controller
    from equipoise.server.serving import HttpServer

    made: list[Controller] = []

    def make_service() -> Service:
        controller = Controller(spec, launcher, state=ranks.state)
        made.append(controller)
        controller.start()
        # Their clients have gone with the server before, and cannot ask for them again.
        for request_id in controller.unfinished():
            controller.cancel(request_id)
        try:
            closing.callback(ControlSocket(controller, ranks.socket).close)
        except BaseException:
            controller.close()
            raise
        return controller

    def give_up() -> None:
        # First: a controller that is about to be made starts nothing either.
        launcher.close()
        for controller in made:
            controller.close()

    def tell(service: Service) -> None:
        typer.echo(f"serving {settings.model_name or service.facts.name} at {server.url}")

    with _open_log(log) as stream, ExitStack() as closing:
        server = HttpServer(settings, stream)
        # Before there are threads: what ranks come from is loaded meanwhile.
        launcher = make_launcher()
        closing.callback(launcher.close)
        number = "1 rank" if spec.num_ranks == 1 else f"{spec.num_ranks} ranks"
        typer.echo(f"loading {spec.model} on {number}")
        drained = server.run(make_service, tell, give_up)
    if not drained:
        typer.echo("equipoise: ended with requests unfinished", err=True)
        raise typer.Exit(1)


def _serve_by_torchrun(
    place: TorchrunRank,
    settle: Callable[[], ServiceSpec],
    make_settings: Callable[[], ServerSettings],
    log: Path | None,
    ranks: Ranks,
    timeout_s: float,
) -> None:
    """As one of torchrun's processes: the first serves, and each keeps a rank."""
    from equipoise.launch.meeting import describe_service
    from equipoise.launch.torchrun import RankEnded, agree
    from equipoise.launch.torchrun_ranks import (
        TorchrunLauncher,
        find_launcher,
        find_master_address,
        keep_place,
    )

    def settle_here() -> tuple[ServiceSpec, ServerSettings | None]:
        spec = settle()
        if place.rank:
            return spec, None
        interface = ranks.interface or find_master_address(os.environ)
        return replace(spec, interface=_find_address(interface)), make_settings()

    try:
        (spec, settings), store = agree(
            place,
            settle_here,
            lambda both: describe_service(both[0]),
            _tell,
            timeout_s=timeout_s,
        )
    except RankEnded as error:
        raise typer.Exit(2 if error.expected else 1) from error
    local = _make_local(spec)

    def keep() -> int:
        address, token = find_launcher(store, spec.start_s)
        return keep_place(place, local, spec.device, address, token, spec.start_s)

    if settings is None:
        # The server ends those that are in flight first, and then its ranks.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        raise typer.Exit(keep())

    def make_launcher() -> TorchrunLauncher:
        launcher = TorchrunLauncher(place.size, spec.interface, store)

        def keep_here() -> None:
            try:
                keep()
            except EquipoiseError as error:
                launcher.close(str(error))

        threading.Thread(target=keep_here, name="equipoise-keeper", daemon=True).start()
        return launcher

    _serve(spec, settings, log, ranks, make_launcher)


def _tell(failure: Failure) -> None:
    typer.echo(f"equipoise: {failure.text}", err=True)


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
