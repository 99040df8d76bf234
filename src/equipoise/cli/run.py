"""`equipoise run`: the main job."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer

from equipoise.cli import run_options as option
from equipoise.cli.config import list_options, parse_redundant
from equipoise.cli.faults import read_faults, run_through_faults
from equipoise.cli.run_asked import (
    LONGEST_TIMEOUT_S,
    Asked,
    AskedBalancing,
    AskedEngine,
    AskedOutput,
    AskedTexts,
    AskedWords,
    JobLimits,
    settle,
)
from equipoise.errors import ConfigError

if TYPE_CHECKING:
    from equipoise.job.records import Record
    from equipoise.job.spec import JobSpec
    from equipoise.launch.failure import Failure
    from equipoise.launch.torchrun import TorchrunRank
    from equipoise.report.summary import JobSummary

INTERRUPTED, TERMINATED = 130, 143


def run(
    context: typer.Context,
    ranks: option.Ranks = None,
    model: option.Model = None,
    input: option.Input = None,  # noqa: A002 - the option's name
    prompts: option.Prompts = None,
    max_new_tokens: option.MaxNewTokens = 16,
    batch_size: option.BatchSize = 4,
    steps: option.Steps = None,
    redundant_experts: option.RedundantExperts = None,
    policy: option.Policy = None,
    communicator: option.Communicator = None,
    step_interval: option.StepInterval = None,
    window_size: option.WindowSize = None,
    sync: option.Sync = False,
    no_balance: option.NoBalance = False,
    config: option.ConfigFile = None,
    eplb_config: option.EplbConfig = None,
    dtype: option.DType = "float32",
    device: option.Device = "auto",
    dispatch: option.Dispatch = "torch",
    seed: option.Seed = 0,
    timeout: option.Timeout = option.DEFAULT_TIMEOUT_S,
    check: option.Check = True,
    json: option.Json = None,
    report: option.Report = option.DEFAULT_REPORT,
    quiet: option.Quiet = False,
    kill: option.Kill = None,
    hang: option.Hang = None,
) -> None:
    """Serve a Mixture-of-Experts model on several ranks, and balance its experts meanwhile.

    The prompts are served twice, with balancing off and on, and every token is compared with the
    plain model's. Under torchrun each process is one rank. With --kill or --hang they are served
    once, while ranks fail, without a report.
    """
    flags = {
        "num_redundant_experts": parse_redundant(redundant_experts),
        "policy": policy,
        "communicator": communicator,
        "step_interval": step_interval,
        "window_size": window_size,
    }
    words = AskedWords(list_options(context), context.args, config, eplb_config)
    balancing = AskedBalancing(words, flags, sync=sync, no_balance=no_balance)
    engine = AskedEngine(ranks, model, dtype, device, dispatch)
    texts = AskedTexts(input, prompts)
    limits = JobLimits(max_new_tokens, batch_size, steps, seed, timeout, check=check)
    output = AskedOutput(json, report, quiet=quiet)
    with _ended_by_signals():
        faults = read_faults(kill or (), hang or ())
        _run(Asked(balancing, engine, texts, limits, output, faults))


def _run(asked: Asked) -> None:
    from equipoise.launch.torchrun import read_torchrun

    place = read_torchrun(os.environ)
    if asked.faults:
        if place is not None:
            raise ConfigError("--kill and --hang are for ranks of this machine, not of torchrun")
        run_through_faults(
            settle(asked, None), asked.faults, asked.output.json, quiet=asked.output.quiet
        )
    elif place is None:
        _run_here(asked, settle(asked, None))
    else:
        _run_as_rank(asked, place)


def _run_here(asked: Asked, spec: JobSpec) -> None:
    from equipoise.launch.failure import JobFailed
    from equipoise.launch.local import run_local
    from equipoise.launch.seats import assign_local_seats

    screen = _Screen(asked.output)
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


def _run_as_rank(asked: Asked, place: TorchrunRank) -> None:
    from equipoise.launch.torchrun import RankEnded, run_torchrun

    screen = _Screen(asked.output)

    def tell(failure: Failure) -> None:
        screen.close()
        _tell(failure)

    timeout_s = asked.limits.timeout_s
    try:
        if place.rank == 0:
            screen.open()
        run_torchrun(
            place,
            lambda: settle(asked, place),
            screen.take,
            tell,
            timeout_s=timeout_s
            if 1 <= timeout_s <= LONGEST_TIMEOUT_S
            else option.DEFAULT_TIMEOUT_S,
        )
    except RankEnded as error:
        raise typer.Exit(2 if error.expected else 1) from error
    finally:
        screen.close()
    if place.rank == 0:
        screen.write_files()


class _Screen:
    """Shows records as they come, and writes the files that they add up to."""

    def __init__(self, output: AskedOutput) -> None:
        from rich.console import Console

        from equipoise.report.summary import JobSummary

        self._output = output
        self._summary: JobSummary = JobSummary()
        # Standard output is the JSON's where it was asked for there.
        self._console = Console(stderr=str(output.json) == "-")
        self._display: Any = None

    def open(self) -> None:
        """Show that work has begun: the first record comes once models are loaded."""
        if self._output.quiet:
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
        if str(self._output.json) == "-":
            sys.stdout.write(text)
        elif self._output.json is not None:
            _write(self._output.json, text)
        _write(self._output.report, render_html(self._summary))
        if not self._output.quiet:
            self._console.print(f"Report: {self._output.report}", highlight=False, soft_wrap=True)


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
