"""What `equipoise run` was asked for, and the job that it amounts to."""

from __future__ import annotations

import threading
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from equipoise.cli.config import add_switches
from equipoise.cli.devices import find_device
from equipoise.cli.run_options import DEFAULT_PROMPTS
from equipoise.config_sources import add_flag, parse_flags, resolve_config
from equipoise.errors import ConfigError
from equipoise.job.spec import Dispatch, DType, JobSpec, check_dispatch

if TYPE_CHECKING:
    from equipoise.cli.faults import AskedFault
    from equipoise.config import EPLBConfig
    from equipoise.job.spec import Prompt
    from equipoise.launch.torchrun import TorchrunRank

DEFAULTS = {"window_size": 16, "step_interval": 16}
"""A run is short: each kind of text lasts 64 steps, so plans must follow sooner than by default."""
PATIENCE_S = 4.0
"""After so long in silence a word is due."""
LONGEST_TIMEOUT_S = 86_400
LARGEST_SEED = 2**63 - 1
_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Devices without one of which there are no GPUs."""


@dataclass(frozen=True)
class AskedWords:
    """Where options of balancing are named: on the command line, and in files."""

    known_options: list[str]
    extra: list[str]
    file: Path | None
    json: str | None


@dataclass(frozen=True)
class AskedBalancing:
    """How to balance; of `flags`, what is None was not said."""

    words: AskedWords
    flags: dict[str, Any]
    _: KW_ONLY
    sync: bool
    no_balance: bool


@dataclass(frozen=True)
class AskedEngine:
    """What serves."""

    ranks: int | None
    model: Path | None
    dtype: str
    device: str
    dispatch: str


@dataclass(frozen=True)
class AskedTexts:
    """What is served; bundled texts where no file is named."""

    file: Path | None
    num_prompts: int | None


@dataclass(frozen=True)
class JobLimits:
    """As `JobSpec` has them."""

    max_new_tokens: int
    max_batch_size: int
    max_steps: int | None
    seed: int
    timeout_s: float
    _: KW_ONLY
    check: bool


@dataclass(frozen=True)
class AskedOutput:
    """Where figures go."""

    json: Path | None
    report: Path
    _: KW_ONLY
    quiet: bool


@dataclass(frozen=True)
class Asked:
    """What was asked for, as it was written: nothing of it is checked yet."""

    balancing: AskedBalancing
    engine: AskedEngine
    texts: AskedTexts
    limits: JobLimits
    output: AskedOutput
    faults: tuple[AskedFault, ...]


def settle(asked: Asked, place: TorchrunRank | None) -> JobSpec:
    """Check all that can be checked before a rank starts."""
    from equipoise.bundled import model_directory
    from equipoise.models.families import check_weights, read_model_shape
    from equipoise.policy import find_policy
    from equipoise.topology import choose_num_redundant

    config = _resolve_config(asked.balancing)
    dtype = _choose("--dtype", asked.engine.dtype, ("float32", "bfloat16", "float16"))
    device = _choose("--device", asked.engine.device, ("auto", "cpu", "cuda"))
    dispatch = _choose("--dispatch", asked.engine.dispatch, ("torch", "nixl_ep"))
    check_dispatch(dispatch, device, dtype)
    num_ranks = _count_ranks(asked.engine.ranks, place)
    _check_limits(asked.limits)
    model = asked.engine.model or model_directory()
    shape = read_model_shape(model)
    check_weights(model)
    requested = config.num_redundant_experts
    chosen = None if requested == "auto" else requested
    spare = choose_num_redundant(shape.num_experts, num_ranks, chosen)
    if spare > max(num_ranks, shape.num_experts) * num_ranks:
        raise ConfigError(
            f"--redundant-experts {spare}: {shape.num_experts} experts are on all of {num_ranks} "
            f"ranks with {shape.num_experts * (num_ranks - 1)}"
        )
    find_policy(config.policy)
    prompts, held_out = _read_prompts(asked.texts)
    if place is None or place.rank == 0:
        _check_files(asked.output)
    if place is None:
        _preload(model, device)
    _check_communicator(config.communicator)
    found = find_device(device)
    check_dispatch(dispatch, found, dtype)
    if place is None:
        # Last: it may take long.
        _make_policy(config.policy, quiet=asked.output.quiet)
    return JobSpec(
        model=model,
        prompts=prompts,
        held_out=held_out,
        num_ranks=num_ranks,
        config=config,
        dtype=cast("DType", dtype),
        device=found,
        dispatch=cast("Dispatch", dispatch),
        **asdict(asked.limits),
    )


def _resolve_config(asked: AskedBalancing) -> EPLBConfig:
    words = asked.words
    flags = parse_flags(words.json, words.extra, known=words.known_options)
    for key, value in asked.flags.items():
        if value is not None:
            add_flag(flags, key, _name_flag(key), value)
    add_switches(flags, sync=asked.sync, no_balance=asked.no_balance)
    return resolve_config(file=words.file, flags=flags, defaults=DEFAULTS).config


def _check_limits(limits: JobLimits) -> None:
    for flag, value in (
        ("--max-new-tokens", limits.max_new_tokens),
        ("--batch-size", limits.max_batch_size),
        ("--steps", limits.max_steps),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{flag} must be at least 1, got {value}")
    if not 1 <= limits.timeout_s <= LONGEST_TIMEOUT_S:
        raise ConfigError(
            f"--timeout must be from 1 to {LONGEST_TIMEOUT_S} s, got {limits.timeout_s:g}"
        )
    if not 0 <= limits.seed <= LARGEST_SEED:
        raise ConfigError(f"--seed must be from 0 to {LARGEST_SEED}, got {limits.seed}")


def _read_prompts(asked: AskedTexts) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    from equipoise.cli.prompts import read_bundled, read_file

    num_prompts = asked.num_prompts
    if asked.file is not None:
        return read_file(asked.file, num_prompts)
    return read_bundled(DEFAULT_PROMPTS if num_prompts is None else num_prompts)


def _check_files(asked: AskedOutput) -> None:
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


def _preload(model: Path, device: str) -> None:
    """Have what serving takes loaded once, for all ranks."""
    from equipoise.launch.local import preload_ranks
    from equipoise.launch.processes import WARM_UPS, list_modules

    modules = list_modules(model)
    # As a service's ranks. Torch, which knows of GPUs, takes as long to load as the ranks do.
    if device == "cpu" or not any(Path(driver).exists() for driver in _GPU_DRIVERS):
        modules += WARM_UPS
    preload_ranks(modules)


def _check_communicator(name: str) -> None:
    from equipoise.comm.registry import check_name

    check_name(name)


def _make_policy(name: str, *, quiet: bool) -> None:
    """Make it here first: what it compiles is kept on disk, and ranks need not all compile it."""
    from equipoise.policy import get_policy

    words = f"compiling the policy {name}, once: half a minute or so"
    told = threading.Timer(PATIENCE_S, typer.echo, [words], {"err": True})
    told.daemon = True
    if not quiet:
        told.start()
    try:
        get_policy(name)
    finally:
        told.cancel()


def _name_flag(key: str) -> str:
    return "--" + key.removeprefix("num_").replace("_", "-")


def _choose(flag: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ConfigError(f"{flag} {value}: must be one of {', '.join(choices)}")
    return value
