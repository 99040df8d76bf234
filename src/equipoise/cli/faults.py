"""`equipoise run --kill` and `--hang`: ranks fail while prompts are served; the text goes on."""

from __future__ import annotations

import json as json_format
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from equipoise.errors import ConfigError, MembershipError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from equipoise.elastic.controller import Controller
    from equipoise.elastic.service import RequestFailed
    from equipoise.elastic.spec import Fault, ServiceSpec
    from equipoise.engine.requests import Delta
    from equipoise.job.spec import JobSpec

SILENCE_S = 5.0
"""Until a rank that hangs is given up: a newcomer who watches shall not wait long."""


@dataclass(frozen=True)
class AskedFault:
    """A fault as it was asked for.

    Attributes:
        rank: its number.
        step: of the rank's forward passes, from 1.
        how: what it does to itself.
    """

    rank: int
    step: int
    how: Literal["kill", "hang"]


def read_faults(kill: Sequence[str], hang: Sequence[str]) -> tuple[AskedFault, ...]:
    """What --kill and --hang name, each RANK@STEP. Raises: ConfigError."""
    faults = []
    for how, texts in (("kill", kill), ("hang", hang)):
        for text in texts:
            rank, mark, step = text.partition("@")
            if not (mark and rank.isdecimal() and step.isdecimal() and int(step) >= 1):
                raise ConfigError(f"--{how} {text}: must be RANK@STEP, like 1@40")
            faults.append(AskedFault(int(rank), int(step), "kill" if how == "kill" else "hang"))
    return tuple(faults)


def run_through_faults(
    job: JobSpec, asked: Sequence[AskedFault], json: Path | None, *, quiet: bool
) -> None:
    """Serve a job's prompts while ranks fail, and compare every token with the plain model's.

    Args:
        job: what to serve; in one pass, with balancing.
        asked: faults.
        json: where figures go; "-" for standard output.
        quiet: show nothing.
    Raises: ConfigError if a fault names no rank; MembershipError if requests failed.
    """
    from equipoise.elastic.controller import Controller
    from equipoise.elastic.spec import Fault
    from equipoise.launch.processes import LocalLauncher

    for one in asked:
        if one.rank >= job.num_ranks:
            raise ConfigError(
                f"--{one.how} {one.rank}@{one.step}: ranks are 0 to {job.num_ranks - 1}"
            )
    prompts, faults = _encode(job), [Fault(f"rank-{one.rank}", one.step, one.how) for one in asked]
    spec = _make_spec(job, prompts, faults)

    def say(text: str) -> None:
        if not quiet:
            typer.echo(text, err=str(json) == "-")

    say(f"serving {len(prompts)} prompts on {job.num_ranks} ranks")
    controller = Controller(spec, LocalLauncher(job.device, job.model))
    controller.start()
    try:
        answers = _serve(job, controller, prompts, say)
        totals = controller.status().totals
    finally:
        controller.close()
    figures: dict[str, Any] = {
        "requests": len(prompts),
        "tokens": sum(map(len, answers)),
        "deaths": totals.deaths,
        "recoveries": totals.recoveries,
        "run_again": totals.rerun,
    }
    if job.check:
        say("comparing every token with the plain model's")
        figures["identical"] = _count_identical(job, prompts, answers)
    _show(figures, say)
    if json is not None:
        text = json_format.dumps(figures, indent=2) + "\n"
        typer.echo(text, nl=False) if str(json) == "-" else json.write_text(text)


def _make_spec(
    job: JobSpec, prompts: Sequence[Sequence[int]], faults: Sequence[Fault]
) -> ServiceSpec:
    from equipoise.elastic.spec import ServiceSpec

    return ServiceSpec(
        model=job.model,
        num_ranks=job.num_ranks,
        config=job.config,
        dtype=job.dtype,
        device=job.device,
        max_batch_size=job.max_batch_size,
        max_len=max(map(len, prompts)) + job.max_new_tokens,
        queue_limit=len(prompts),
        timeout_s=job.timeout_s,
        silence_s=SILENCE_S,
        faults=tuple(faults),
    )


def _encode(job: JobSpec) -> list[tuple[int, ...]]:
    from equipoise.job.texts import encode_all
    from equipoise.models.families import read_config
    from equipoise.models.loading import load_tokenizer

    config = read_config(job.model)
    longest = config.get("text_config", config).get("max_position_embeddings")
    return encode_all(load_tokenizer(job.model), job.prompts, "prompt", job.max_new_tokens, longest)


def _serve(
    job: JobSpec, controller: Controller, prompts: Sequence[tuple[int, ...]], say: Any
) -> list[list[int]]:
    """Each prompt's tokens; says what becomes of ranks meanwhile."""
    from equipoise.elastic.service import RequestFailed, ServiceRequest
    from equipoise.engine.requests import SamplingParams

    answers: list[list[int]] = [[] for _ in prompts]
    failed: list[str] = []
    left = len(prompts)
    changed = threading.Condition()

    def take(event: Delta | RequestFailed) -> None:
        nonlocal left
        with changed:
            if isinstance(event, RequestFailed):
                failed.append(event.reason)
                left -= 1
            else:
                answers[int(event.request_id)] += event.tokens
                left -= event.finish_reason is not None
            changed.notify_all()

    started = time.monotonic()
    for number, tokens in enumerate(prompts):
        sampling = SamplingParams(max_new_tokens=job.max_new_tokens)
        controller.submit(ServiceRequest(str(number), tokens, sampling), take)
    told: set[str] = set()
    with changed:
        while left:
            changed.wait(0.1)
            changed.release()
            try:
                _tell_deaths(controller, told, left, say)
            finally:
                changed.acquire()
    if failed:
        raise MembershipError(f"{len(failed)} requests failed: {failed[0]}")
    say(f"{sum(map(len, answers))} tokens in {time.monotonic() - started:.1f} s")
    return answers


def _tell_deaths(controller: Controller, told: set[str], left: int, say: Any) -> None:
    status = controller.status()
    for rank in status.ranks:
        if rank.state == "dead" and rank.name not in told:
            told.add(rank.name)
            say(f"{rank.detail}, with {left} requests unfinished")
    mark = f"recovery {status.totals.recoveries}"
    if status.totals.recoveries and mark not in told:
        told.add(mark)
        serving = [rank.name for rank in status.ranks if rank.state == "serving"]
        say(f"{', '.join(serving)} go on as generation {status.generation}")


def _count_identical(
    job: JobSpec, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> int:
    """Tokens that are the plain model's greedy ones, up to each answer's first that is not."""
    import torch

    from equipoise.models.loading import load_model

    plain = load_model(job.model, getattr(torch, job.dtype), torch.device(job.device))
    same = 0
    with torch.inference_mode():
        for prompt, answer in zip(prompts, answers, strict=True):
            sequence = torch.tensor([[*prompt, *answer[:-1]]], device=job.device)
            output = plain(input_ids=sequence, use_cache=False, logits_to_keep=len(answer))
            best: list[int] = output.logits[0].argmax(dim=-1).tolist()
            pairs = zip(best, answer, strict=True)
            same += next((n for n, (want, got) in enumerate(pairs) if want != got), len(answer))
    return same


def _show(figures: dict[str, Any], say: Any) -> None:
    say(
        f"{figures['deaths']} ranks died, {figures['recoveries']} recoveries; "
        f"{figures['run_again']} requests were run again elsewhere from their tokens so far"
    )
    if "identical" in figures:
        say(f"{figures['identical']} of {figures['tokens']} tokens are the plain model's")
