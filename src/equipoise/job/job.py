"""A job: the same prompts with balancing off and on, and what can be said of both."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from equipoise.balancer import EplbState, RebalanceOutcome
from equipoise.comm.groups import RankGroup
from equipoise.engine.engine import Engine, EngineLimits
from equipoise.engine.figures import StepFigures
from equipoise.engine.requests import Request, SamplingParams
from equipoise.errors import ConfigError
from equipoise.job.check import check_outputs
from equipoise.job.dispatching import JobDispatch
from equipoise.job.ledger import merge_steps
from equipoise.job.loss import Scores, Text, score_in_lockstep, score_plain
from equipoise.job.records import (
    CheckRecord,
    Emit,
    JobRecord,
    LoadRecord,
    LossRecord,
    Pass,
    PhaseRecord,
    RebalanceRecord,
    Record,
    ResultRecord,
    StepRecord,
)
from equipoise.job.spec import JobSpec
from equipoise.job.texts import encode_all, list_kinds
from equipoise.models.families import read_config, read_model_shape
from equipoise.models.loading import load_model, load_tokenizer
from equipoise.models.parallel import ParallelModel, parallelize

MERGE_STEPS = 16
"""Steps between two meetings of the ranks beyond the model's own: there figures are merged, and
whether anybody has requests left is found out. So a pass ends with up to 15 dummy steps."""

PROGRESS_S = 2.0
"""Between two words on how far reading is."""


@dataclass(frozen=True)
class _Job:
    """What a job works with on this rank."""

    spec: JobSpec
    group: RankGroup
    emit: Emit
    tokenizer: Any
    kinds: tuple[str, ...]
    prompts: list[tuple[int, ...]]
    held_out: list[Text]
    parallel: ParallelModel
    limits: EngineLimits
    dispatch: JobDispatch

    def say(self, record: Record) -> None:
        """Emit on rank 0."""
        if self.group.rank == 0:
            self.emit(record)

    def close(self, wait_s: float | None = None) -> None:
        """Release the wires."""
        if self.parallel.state.close(wait_s=wait_s):
            for communicator in self.parallel.communicators:
                communicator.close()
        for dispatcher in self.parallel.dispatchers:
            dispatcher.close()
        self.dispatch.close()

    def owned(self) -> list[int]:
        """Prompts of this rank."""
        return list(range(self.group.rank, len(self.prompts), self.group.size))


def run_job(spec: JobSpec, group: RankGroup, emit: Emit) -> None:
    """Serve the prompts twice, compare, and say what happened.

    In this order: the pass without balancing; the held-out loss on the initial placement; the pass
    with balancing; the loss on the placement that it arrived at; the comparison with the plain
    model, which rank 0 loads beside its slots.

    Args:
        spec: the same on every rank.
        group: its ranks; its timeout must allow for rank 0 loading the plain model.
        emit: called on rank 0 only, with records in the order that records.py gives.
    Collective: every rank of the group.
    Raises: ConfigError, PlacementError or ModelError, on every rank, if the job cannot be done;
        TransferError or MembershipError within the deadline if a rank does not take part.
    """
    torch.manual_seed(spec.seed)
    if group.device.type == "cpu":
        # Ranks share the cores; threads of theirs would only wait for each other.
        torch.set_num_threads(1)
    job = _prepare(spec, group, emit)
    try:
        _run(job)
    except BaseException:
        # Not waiting for a worker that may be in an exchange: the error comes first.
        job.close(wait_s=0.0)
        raise


def _run(job: _Job) -> None:
    job.say(_describe(job))
    # The first forward pass of a process pays for late imports; neither pass shall.
    Engine(job.parallel, EngineLimits(1, 1), balance=False).step()
    off, off_s = _serve(job, "off", None)
    before = _score(job)
    on, on_s = _serve(job, "on", job.parallel.state)
    # A rebalance that is still under way shall not move experts under what follows. The wires stay
    # until the end: NIXL-EP loses a peer's memory when an agent of NIXL lets go of the peer.
    job.parallel.state.close()
    after = _score(job)
    plain_scores, check = _check(job, off, on) if job.spec.check else (None, None)
    samples = _gather_samples(job, on)
    losses = _list_losses(job, before, after, plain_scores)
    job.say(ResultRecord(check, losses, {"off": off_s, "on": on_s}, samples))
    job.close()


def _prepare(spec: JobSpec, group: RankGroup, emit: Emit) -> _Job:
    _compare_with_group(spec, group)
    # Also refuses families that the engine does not serve.
    read_model_shape(spec.model)
    tokenizer = load_tokenizer(spec.model)
    longest = read_config(spec.model).get("max_position_embeddings")
    prompts = encode_all(tokenizer, spec.prompts, "prompt", spec.max_new_tokens, longest)
    held_out = encode_all(tokenizer, spec.held_out, "held-out text", 0, longest)
    kinds = list_kinds(spec.prompts, spec.held_out)
    longest_prompt = max(map(len, prompts)) + spec.max_new_tokens
    limits = EngineLimits(
        max_batch_size=spec.max_batch_size, max_len=longest_prompt, keep_load=True
    )
    per_step = limits.prefill_chunk + limits.max_batch_size
    dispatch = JobDispatch(spec, group, max([per_step, *map(len, held_out)]))
    parallel = parallelize(
        spec.model,
        group,
        spec.config,
        dispatcher=dispatch.create,
        dtype=_dtype(spec),
        attention="sdpa",
        # Ranks read alike: rank 0 speaks for all.
        progress=_Progress(emit) if group.rank == 0 else None,
    )
    return _Job(
        spec=spec,
        group=group,
        emit=emit,
        tokenizer=tokenizer,
        kinds=kinds,
        prompts=prompts,
        held_out=[
            Text(kinds.index(text.kind), tokens)
            for text, tokens in zip(spec.held_out, held_out, strict=True)
        ],
        parallel=parallel,
        limits=limits,
        dispatch=dispatch,
    )


class _Progress:
    """Says every other second how far reading is: a small model says nothing."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._said_s = time.monotonic()

    def __call__(self, bytes_read: int, bytes_due: int) -> None:
        if time.monotonic() - self._said_s >= PROGRESS_S:
            self._said_s = time.monotonic()
            self._emit(LoadRecord(bytes_read, bytes_due))


def _compare_with_group(spec: JobSpec, group: RankGroup) -> None:
    if spec.num_ranks != group.size:
        raise ConfigError(f"the job is for {spec.num_ranks} ranks, but the group has {group.size}")
    if spec.device != group.device.type:
        raise ConfigError(f"the job is for {spec.device}, but the group is on {group.device}")
    if not spec.prompts:
        raise ConfigError("there are no prompts: a job needs at least one")
    for name in ("max_new_tokens", "max_batch_size"):
        if getattr(spec, name) < 1:
            raise ConfigError(f"{name} must be at least 1, got {getattr(spec, name)}")
    if spec.max_steps is not None and spec.max_steps < 1:
        raise ConfigError(f"max_steps must be at least 1, got {spec.max_steps}")


def _dtype(spec: JobSpec) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return dtype


def _describe(job: _Job) -> JobRecord:
    spec, device = job.spec, job.group.device
    weights, maps = job.parallel.spread.expert_weights, job.parallel.spread.maps
    (wire,) = job.parallel.communicators
    chosen = f" ({wire.reason})" if spec.config.communicator == "auto" else ""
    return JobRecord(
        model=str(spec.model),
        device="cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        dtype=spec.dtype,
        communicator=wire.name + chosen,
        policy=spec.config.policy,
        num_prompts=len(spec.prompts),
        kinds=job.kinds,
        placement=maps.placement,
        num_parameters=_count_parameters(job.parallel),
        expert_bytes=sum(t[0].numel() * t.element_size() for t in weights[0]),
    )


def _count_parameters(parallel: ParallelModel) -> int:
    """Of the logical model: in place of this rank's slots, all experts."""
    assert parallel.checkpoint is not None
    num_experts = parallel.spread.maps.placement.num_experts
    tensors = [tensor for weights in parallel.spread.expert_weights for tensor in weights]
    elsewhere = sum((num_experts - tensor.shape[0]) * tensor[0].numel() for tensor in tensors)
    return parallel.checkpoint.num_parameters + elsewhere


def _serve(
    job: _Job, in_pass: Pass, balancer: EplbState | None
) -> tuple[dict[int, Request], float]:
    """One pass over the prompts; this rank's requests by prompt, and the pass's wall seconds."""
    job.say(PhaseRecord(in_pass))
    limits = replace(job.limits, keep_logits=job.spec.check and balancer is not None)
    engine = Engine(job.parallel, limits, balance=balancer is not None)
    prompts = job.spec.prompts
    sampling = SamplingParams(max_new_tokens=job.spec.max_new_tokens)
    requests = {
        i: Request(str(i), job.prompts[i], sampling, kind=job.kinds.index(prompts[i].kind))
        for i in job.owned()
    }
    engine.submit(*requests.values())
    started_s = time.perf_counter()
    num_steps, goes_on = 0, True
    most = job.spec.max_steps
    while goes_on and (most is None or num_steps < most):
        num_due = MERGE_STEPS if most is None else min(MERGE_STEPS, most - num_steps)
        figures: list[StepFigures] = []
        outcomes: list[RebalanceOutcome] = []
        for _ in range(num_due):
            result = engine.step()
            figures.append(result.figures)
            outcomes += result.outcomes
        records, anybody_works = merge_steps(
            job.group,
            figures,
            first_step=num_steps + 1,
            in_pass=in_pass,
            kinds=job.kinds,
            has_work=engine.has_work,
        )
        rebalances = [_make_rebalance_record(outcome) for outcome in outcomes]
        # Stable: at one step, what ran comes before what was moved after it.
        said: list[StepRecord | RebalanceRecord] = [*records, *rebalances]
        for record in sorted(said, key=lambda record: record.step):
            job.say(record)
        num_steps += num_due
        goes_on = anybody_works
        if balancer is not None and not anybody_works:
            # What is under way ends within dummy steps, the same number on every rank.
            balancer.pause()
            goes_on = balancer.is_rebalancing
    return requests, time.perf_counter() - started_s


def _make_rebalance_record(outcome: RebalanceOutcome) -> RebalanceRecord:
    return RebalanceRecord(
        planned_step=outcome.planned_step,
        step=outcome.step,
        moves=outcome.moves,
        local_moves=outcome.local_moves,
        moves_per_layer=outcome.moves_per_layer,
        bytes=outcome.bytes,
        plan_s=outcome.plan_s,
        transfer_s=outcome.transfer_s,
        forward_s=outcome.forward_s,
        balancedness_before=outcome.balancedness_before,
        balancedness_after=outcome.balancedness_after,
        placement=outcome.placement,
    )


def _score(job: _Job) -> Scores:
    job.say(PhaseRecord("loss"))
    return score_in_lockstep(job.group, job.parallel.spread, job.held_out, len(job.kinds))


def _check(
    job: _Job, off: dict[int, Request], on: dict[int, Request]
) -> tuple[Scores | None, CheckRecord | None]:
    """Both None on other ranks than 0."""
    job.say(PhaseRecord("check"))
    plain: Any = None
    if job.group.rank == 0:
        plain = load_model(job.spec.model, _dtype(job.spec), job.group.device)
    vocabulary_size = job.parallel.model.config.vocab_size
    check = check_outputs(job.group, plain, job.prompts, off, on, vocabulary_size)
    if plain is None:
        return None, check
    return score_plain(plain, job.held_out, len(job.kinds)), check


def _gather_samples(job: _Job, on: dict[int, Request]) -> tuple[tuple[str, str, str], ...]:
    """The first prompt of each kind with its continuation."""
    firsts: dict[str, int] = {}
    for number, prompt in enumerate(job.spec.prompts):
        firsts.setdefault(prompt.kind, number)
    samples = []
    for kind, number in firsts.items():
        tokens = torch.full((job.spec.max_new_tokens,), -1)
        if number in on:
            generated = torch.tensor(on[number].generated, dtype=torch.int64)
            tokens[: len(generated)] = generated
        job.group.all_reduce(tokens, "max")
        text = job.tokenizer.decode(tokens[tokens >= 0].tolist(), skip_special_tokens=True)
        samples.append((kind, job.spec.prompts[number].text, text))
    return tuple(samples)


def _list_losses(
    job: _Job, before: Scores, after: Scores, plain: Scores | None
) -> tuple[LossRecord, ...]:
    return tuple(
        LossRecord(
            kind=name,
            num_tokens=int(before.num_tokens[kind]),
            off=before.mean(kind),
            on=after.mean(kind),
            plain=None if plain is None else plain.mean(kind),
        )
        for kind, name in enumerate(job.kinds)
        if before.num_tokens[kind] > 0
    )
