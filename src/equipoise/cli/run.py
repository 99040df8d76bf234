"""`equipoise run`: the main job."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from equipoise.cli.config import list_options
from equipoise.cli.faults import AskedFault, read_faults, run_through_faults
from equipoise.config_sources import add_flag, parse_flags, resolve_config
from equipoise.errors import ConfigError
from equipoise.job.spec import Dispatch, DType, JobSpec, check_dispatch

if TYPE_CHECKING:
    from equipoise.config import EPLBConfig
    from equipoise.job.records import Record
    from equipoise.job.spec import Prompt
    from equipoise.launch.failure import Failure
    from equipoise.launch.torchrun import TorchrunRank
    from equipoise.report.summary import JobSummary

DEFAULTS = {"window_size": 16, "step_interval": 16}
"""A run is short: each kind of text lasts 64 steps, so plans must follow sooner than by default."""
DEFAULT_PROMPTS = 256
DEFAULT_REPORT = Path("equipoise-report.html")

DEFAULT_TIMEOUT_S = 60.0
PATIENCE_S = 4.0
"""After so long in silence a word is due."""
LONGEST_TIMEOUT_S = 86_400
LARGEST_SEED = 2**63 - 1

INTERRUPTED, TERMINATED = 130, 143

Text = str | None


def run(
    context: typer.Context,
    ranks: Annotated[
        int | None, typer.Option(help="Processes that share the experts.  [4]")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Hugging Face checkpoint directory.  [the bundled model]")
    ] = None,
    input: Annotated[  # noqa: A002 - the option's name
        Path | None, typer.Option(help="Text file to continue.  [bundled texts of four kinds]")
    ] = None,
    prompts: Annotated[
        int | None, typer.Option(help=f"How many prompts.  [{DEFAULT_PROMPTS}; all of --input]")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens per prompt.")] = 16,
    batch_size: Annotated[int, typer.Option(help="Sequences in flight per rank.")] = 4,
    steps: Annotated[int | None, typer.Option(help="Most steps per pass.  [no limit]")] = None,
    redundant_experts: Annotated[Text, typer.Option(help="auto, or a number.  [auto]")] = None,
    policy: Annotated[Text, typer.Option(help="See `equipoise policies`.  [flow]")] = None,
    communicator: Annotated[Text, typer.Option(help="Wire for weights.  [auto]")] = None,
    step_interval: Annotated[int | None, typer.Option(help="Steps between plans.  [16]")] = None,
    window_size: Annotated[int | None, typer.Option(help="Steps planned from.  [16]")] = None,
    sync: Annotated[bool, typer.Option("--sync", help="Not in the background.")] = False,
    config: Annotated[
        Path | None, typer.Option(help="YAML or JSON file of options: see `equipoise config`.")
    ] = None,
    eplb_config: Annotated[
        Text, typer.Option(help="JSON object of options; or --eplb-config.OPTION VALUE.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dispatch: Annotated[str, typer.Option(help="Of tokens: torch or nixl_ep.")] = "torch",
    seed: Annotated[int, typer.Option(help="Of whatever is random.")] = 0,
    timeout: Annotated[
        float, typer.Option(help="Longest wait for another rank, s.")
    ] = DEFAULT_TIMEOUT_S,
    check: Annotated[bool, typer.Option(help="Compare with the plain model.")] = True,
    json: Annotated[Path | None, typer.Option(help="Write figures here; - for stdout.")] = None,
    report: Annotated[Path, typer.Option(help="Write one HTML file here.")] = DEFAULT_REPORT,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show nothing while it runs.")] = False,
    kill: Annotated[
        list[str] | None, typer.Option(help="RANK@STEP: kill a rank; may repeat.")
    ] = None,
    hang: Annotated[
        list[str] | None, typer.Option(help="RANK@STEP: stop a rank, unheard; may repeat.")
    ] = None,
) -> None:
    """Serve a Mixture-of-Experts model on several ranks, and balance its experts meanwhile.

    The prompts are served twice, with balancing off and on, and every token is compared with the
    plain model's. Under torchrun each process is one rank. With --kill or --hang they are served
    once, while ranks fail, without a report.
    """
    with _ended_by_signals():
        _run(
            _Asked(
                known_options=list_options(context),
                extra=context.args,
                config_file=config,
                eplb_config=eplb_config,
                config_flags={
                    "num_redundant_experts": _parse_redundant(redundant_experts),
                    "policy": policy,
                    "communicator": communicator,
                    "step_interval": step_interval,
                    "window_size": window_size,
                    "use_async": False if sync else None,
                },
                ranks=ranks,
                model=model,
                text=input,
                prompts=prompts,
                dtype=dtype,
                device=device,
                dispatch=dispatch,
                limits={
                    "max_new_tokens": max_new_tokens,
                    "max_batch_size": batch_size,
                    "max_steps": steps,
                    "check": check,
                    "seed": seed,
                    "timeout_s": timeout,
                },
                json=json,
                report=report,
                quiet=quiet,
                faults=read_faults(kill or (), hang or ()),
            )
        )


@dataclass(frozen=True)
class _Asked:
    """What was asked for, as it was written: nothing of it is checked yet."""

    known_options: list[str]
    extra: list[str]
    config_file: Path | None
    eplb_config: str | None
    config_flags: dict[str, Any]
    ranks: int | None
    model: Path | None
    text: Path | None
    prompts: int | None
    dtype: str
    device: str
    dispatch: str
    limits: dict[str, Any]
    json: Path | None
    report: Path
    quiet: bool
    faults: tuple[AskedFault, ...]


def _run(asked: _Asked) -> None:
    from equipoise.launch.torchrun import read_torchrun

    place = read_torchrun(os.environ)
    if asked.faults:
        if place is not None:
            raise ConfigError("--kill and --hang are for ranks of this machine, not of torchrun")
        run_through_faults(_settle(asked, None), asked.faults, asked.json, quiet=asked.quiet)
    elif place is None:
        _run_here(asked, _settle(asked, None))
    else:
        _run_as_rank(asked, place)


def _settle(asked: _Asked, place: TorchrunRank | None) -> JobSpec:
    """Check all that can be checked before a rank starts."""
    from equipoise.bundled import model_directory
    from equipoise.models.families import check_weights, read_model_shape
    from equipoise.policy import find_policy
    from equipoise.topology import choose_num_redundant

    config = _resolve_config(asked)
    dtype = _choose("--dtype", asked.dtype, ("float32", "bfloat16", "float16"))
    device = _choose("--device", asked.device, ("auto", "cpu", "cuda"))
    dispatch = _choose("--dispatch", asked.dispatch, ("torch", "nixl_ep"))
    check_dispatch(dispatch, device, dtype)
    num_ranks = _count_ranks(asked.ranks, place)
    _check_limits(asked.limits)
    model = asked.model or model_directory()
    shape = read_model_shape(model)
    check_weights(model)
    requested = config.num_redundant_experts
    choose_num_redundant(shape.num_experts, num_ranks, None if requested == "auto" else requested)
    find_policy(config.policy)
    prompts, held_out = _read_prompts(asked)
    if place is None or place.rank == 0:
        _check_files(asked)
    if place is None:
        from equipoise.launch.local import preload_ranks

        preload_ranks()
        _make_policy(config.policy)
    _check_communicator(config.communicator)
    found = _find_device(device)
    check_dispatch(dispatch, found, dtype)
    return JobSpec(
        model=model,
        prompts=prompts,
        held_out=held_out,
        num_ranks=num_ranks,
        config=config,
        dtype=cast("DType", dtype),
        device=found,
        dispatch=cast("Dispatch", dispatch),
        **asked.limits,
    )


def _run_here(asked: _Asked, spec: JobSpec) -> None:
    from equipoise.launch.failure import JobFailed
    from equipoise.launch.local import run_local
    from equipoise.launch.seats import assign_local_seats

    screen = _Screen(asked)
    try:
        screen.open()
        run_local(spec, assign_local_seats(spec.num_ranks, spec.device), screen.take)
    except JobFailed as error:
        screen.close()
        _tell(error.failure)
        raise typer.Exit(2 if error.failure.expected else 1) from error
    finally:
        screen.close()
    screen.write_files()


def _run_as_rank(asked: _Asked, place: TorchrunRank) -> None:
    from equipoise.launch.torchrun import RankEnded, run_torchrun

    screen = _Screen(asked)

    def tell(failure: Failure) -> None:
        screen.close()
        _tell(failure)

    timeout_s = asked.limits["timeout_s"]
    try:
        if place.rank == 0:
            screen.open()
        run_torchrun(
            place,
            lambda: _settle(asked, place),
            screen.take,
            tell,
            timeout_s=timeout_s if 1 <= timeout_s <= LONGEST_TIMEOUT_S else DEFAULT_TIMEOUT_S,
        )
    except RankEnded as error:
        raise typer.Exit(2 if error.expected else 1) from error
    finally:
        screen.close()
    if place.rank == 0:
        screen.write_files()


class _Screen:
    """Shows records as they come, and writes the files that they add up to."""

    def __init__(self, asked: _Asked) -> None:
        from rich.console import Console

        from equipoise.report.summary import JobSummary

        self._asked = asked
        self._summary: JobSummary = JobSummary()
        # Standard output is the JSON's where it was asked for there.
        self._console = Console(stderr=str(asked.json) == "-")
        self._display: Any = None

    def open(self) -> None:
        """Show that work has begun: the first record comes once models are loaded."""
        if self._asked.quiet:
            return
        from equipoise.report.live import LiveDisplay
        from equipoise.report.plain import PlainDisplay

        display = LiveDisplay if self._console.is_terminal else PlainDisplay
        self._display = display(self._console, self._summary)

    def take(self, record: Record) -> None:
        """Sum a record up, and show it."""
        self._summary.add(record)
        if self._display is not None:
            self._display.show(record)

    def close(self) -> None:
        """Give the terminal back; twice is fine."""
        if self._display is not None:
            self._display.close()
            self._display = None

    def write_files(self) -> None:
        """Write what was asked for, whole or not at all."""
        from equipoise.report.html import render_html
        from equipoise.report.result import write_json

        text = write_json(self._summary)
        if str(self._asked.json) == "-":
            sys.stdout.write(text)
        elif self._asked.json is not None:
            _write(self._asked.json, text)
        _write(self._asked.report, render_html(self._summary))
        if not self._asked.quiet:
            self._console.print(f"Report: {self._asked.report}", highlight=False, soft_wrap=True)


def _write(path: Path, text: str) -> None:
    from equipoise.report.files import write_atomically

    try:
        write_atomically(path, text)
    except OSError as error:
        typer.echo(f"equipoise: {path}: cannot be written: {error.strerror}", err=True)
        raise typer.Exit(1) from error


def _tell(failure: Failure) -> None:
    """Say what a job ended with."""
    from equipoise.cli import DEBUG_FLAG

    if DEBUG_FLAG in sys.argv:
        sys.stderr.write(failure.traceback)
    typer.echo(f"equipoise: {failure.text}", err=True)


def _resolve_config(asked: _Asked) -> EPLBConfig:
    flags = parse_flags(asked.eplb_config, asked.extra, known=asked.known_options)
    for key, value in asked.config_flags.items():
        if value is not None:
            flag = "--sync" if key == "use_async" else _name_flag(key)
            add_flag(flags, key, flag, value)
    return resolve_config(file=asked.config_file, flags=flags, defaults=DEFAULTS).config


def _check_limits(limits: dict[str, Any]) -> None:
    for flag, key in (
        ("--max-new-tokens", "max_new_tokens"),
        ("--batch-size", "max_batch_size"),
        ("--steps", "max_steps"),
    ):
        if limits[key] is not None and limits[key] < 1:
            raise ConfigError(f"{flag} must be at least 1, got {limits[key]}")
    if not 1 <= limits["timeout_s"] <= LONGEST_TIMEOUT_S:
        raise ConfigError(
            f"--timeout must be from 1 to {LONGEST_TIMEOUT_S} s, got {limits['timeout_s']:g}"
        )
    if not 0 <= limits["seed"] <= LARGEST_SEED:
        raise ConfigError(f"--seed must be from 0 to {LARGEST_SEED}, got {limits['seed']}")


def _read_prompts(asked: _Asked) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    from equipoise.cli.prompts import read_bundled, read_file

    if asked.text is not None:
        return read_file(asked.text, asked.prompts)
    return read_bundled(DEFAULT_PROMPTS if asked.prompts is None else asked.prompts)


def _check_files(asked: _Asked) -> None:
    from equipoise.report.files import check_writable

    if asked.json is not None and str(asked.json) != "-":
        check_writable(asked.json, "--json")
        if asked.json.absolute() == asked.report.absolute():
            raise ConfigError(f"--json and --report are both {asked.json}: name two files")
    check_writable(asked.report, "--report")


def _count_ranks(asked: int | None, place: TorchrunRank | None) -> int:
    if asked is not None and asked < 1:
        raise ConfigError(f"--ranks must be at least 1, got {asked}")
    if place is None:
        return 4 if asked is None else asked
    if asked is not None and asked != place.size:
        raise ConfigError(
            f"--ranks {asked}, but torchrun started {place.size}: leave --ranks out, or start "
            f"{asked}"
        )
    return place.size


def _find_device(asked: str) -> Literal["cpu", "cuda"]:
    if asked == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if asked == "cuda":
        raise ConfigError("--device cuda: torch sees no CUDA device here; use --device cpu")
    return "cpu"


def _check_communicator(name: str) -> None:
    from equipoise.comm.registry import check_name

    check_name(name)


def _make_policy(name: str) -> None:
    """Make it here first: what it compiles is kept on disk, and ranks need not all compile it."""
    from equipoise.policy import get_policy

    words = f"compiling the policy {name}, once: half a minute or so"
    told = threading.Timer(PATIENCE_S, typer.echo, [words], {"err": True})
    told.daemon = True
    told.start()
    try:
        get_policy(name)
    finally:
        told.cancel()


def _name_flag(key: str) -> str:
    return "--" + key.removeprefix("num_").replace("_", "-")


def _parse_redundant(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.lstrip("-").isdecimal() else text


def _choose(flag: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ConfigError(f"{flag} {value}: must be one of {', '.join(choices)}")
    return value


class _Terminated(BaseException):
    """SIGTERM came; not an Exception, so that nothing on the way takes it for its own."""


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """End with 130 on Ctrl-C and with 143 on SIGTERM, once all ranks have ended."""

    def terminate(_number: int, _frame: FrameType | None) -> None:
        raise _Terminated

    heard = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("equipoise: interrupted; all ranks have ended", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except _Terminated:
        typer.echo("equipoise: terminated; all ranks have ended", err=True)
        raise typer.Exit(TERMINATED) from None
    finally:
        signal.signal(signal.SIGTERM, heard)
