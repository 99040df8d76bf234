"""A job: the same prompts with balancing off and on, and what can be said of both."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from equipoise.balancer import EplbState, RebalanceOutcome
from equipoise.comm import create_eplb_communicator
from equipoise.comm.base import EplbCommunicator
from equipoise.comm.groups import RankGroup
from equipoise.dispatch import create_dispatcher
from equipoise.dispatch.base import TokenDispatcher
from equipoise.dispatch.maps import PlacementMaps
from equipoise.engine.engine import Engine, EngineLimits, Request
from equipoise.engine.figures import StepFigures
from equipoise.errors import ConfigError
from equipoise.job.check import check_outputs
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
from equipoise.load.recorder import LoadRecorder
from equipoise.models.checkpoint import Checkpoint
from equipoise.models.experts import ExpertParallelModel, SetPlan
from equipoise.models.families import read_model_shape
from equipoise.models.loading import load_model, load_spread, load_tokenizer
from equipoise.placement import place_in_order
from equipoise.policy import get_policy
from equipoise.topology import Topology, choose_num_redundant

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
    spread: ExpertParallelModel
    dispatcher: TokenDispatcher
    communicator: EplbCommunicator
    balancer: EplbState
    limits: EngineLimits
    num_parameters: int

    def say(self, record: Record) -> None:
        """Emit on rank 0."""
        if self.group.rank == 0:
            self.emit(record)

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
        if job.balancer.close(wait_s=0.0):
            job.communicator.close()
        raise
    finally:
        job.dispatcher.close()


def _run(job: _Job) -> None:
    job.say(_describe(job))
    # The first forward pass of a process pays for late imports; neither pass shall.
    Engine(job.spread, job.group.rank, job.limits).step()
    off, off_s = _serve(job, "off", None, keep_logits=False)
    before = _score(job)
    spread = job.spread
    job.balancer.add_model(
        "model", spread.expert_weights, spread.maps, spread.recorder, job.communicator
    )
    on, on_s = _serve(job, "on", job.balancer, keep_logits=job.spec.check)
    # A rebalance that is still under way shall not move experts under what follows.
    job.balancer.close()
    job.communicator.close()
    after = _score(job)
    plain_scores, check = _check(job, off, on) if job.spec.check else (None, None)
    samples = _gather_samples(job, on)
    losses = _list_losses(job, before, after, plain_scores)
    job.say(ResultRecord(check, losses, {"off": off_s, "on": on_s}, samples))


def _prepare(spec: JobSpec, group: RankGroup, emit: Emit) -> _Job:
    _compare_with_group(spec, group)
    shape = read_model_shape(spec.model)
    requested = spec.config.num_redundant_experts
    num_redundant = choose_num_redundant(
        shape.num_experts, spec.num_ranks, None if requested == "auto" else requested
    )
    topology = Topology(spec.num_ranks, (shape.num_experts + num_redundant) // spec.num_ranks)
    placement = place_in_order(shape.num_layers, shape.num_experts, topology)
    policy = get_policy(spec.config.policy)

    tokenizer = load_tokenizer(spec.model)
    checkpoint = Checkpoint(spec.model, _dtype(spec), group.device, attention="sdpa")
    longest = getattr(checkpoint.model.config, "max_position_embeddings", None)
    prompts = encode_all(tokenizer, spec.prompts, "prompt", spec.max_new_tokens, longest)
    held_out = encode_all(tokenizer, spec.held_out, "held-out text", 0, longest)
    kinds = list_kinds(spec.prompts, spec.held_out)
    num_parameters = checkpoint.num_parameters

    dispatcher = create_dispatcher("torch", group, topology)
    plan = SetPlan(
        layers=checkpoint.layers,
        maps=PlacementMaps(placement, group.device),
        dispatcher=dispatcher,
        recorder=LoadRecorder(shape.num_layers, topology.num_slots, group.device),
    )
    # Ranks read alike: rank 0 speaks for all.
    progress = _Progress(emit) if group.rank == 0 else None
    spread = load_spread(checkpoint, [plan], group, progress)
    balancer = EplbState(spec.config, group, policy)
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
        spread=spread,
        dispatcher=dispatcher,
        communicator=create_eplb_communicator(
            balancer.transfer_group, spec.config.communicator, spread.expert_weights
        ),
        balancer=balancer,
        limits=EngineLimits(
            max_batch_size=spec.max_batch_size,
            max_new_tokens=spec.max_new_tokens,
            max_len=max(map(len, prompts)) + spec.max_new_tokens,
            end_tokens=_find_end_tokens(spread.model),
        ),
        num_parameters=num_parameters,
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


def _find_end_tokens(model: Any) -> frozenset[int]:
    end = model.generation_config.eos_token_id
    if end is None:
        return frozenset()
    return frozenset([end] if isinstance(end, int) else end)


def _describe(job: _Job) -> JobRecord:
    spec, device = job.spec, job.group.device
    chosen = f" ({job.communicator.reason})" if spec.config.communicator == "auto" else ""
    return JobRecord(
        model=str(spec.model),
        device="cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        dtype=spec.dtype,
        communicator=job.communicator.name + chosen,
        policy=spec.config.policy,
        num_prompts=len(spec.prompts),
        kinds=job.kinds,
        placement=job.spread.maps.placement,
        num_parameters=job.num_parameters,
        expert_bytes=sum(t[0].numel() * t.element_size() for t in job.spread.expert_weights[0]),
    )


def _serve(
    job: _Job, in_pass: Pass, balancer: EplbState | None, *, keep_logits: bool
) -> tuple[dict[int, Request], float]:
    """One pass over the prompts; this rank's requests by prompt, and the pass's wall seconds."""
    job.say(PhaseRecord(in_pass))
    limits = replace(job.limits, keep_logits=keep_logits)
    engine = Engine(job.spread, job.group.rank, limits, balancer)
    prompts = job.spec.prompts
    requests = {
        i: Request(i, job.kinds.index(prompts[i].kind), job.prompts[i]) for i in job.owned()
    }
    engine.submit(requests.values())
    started_s = time.perf_counter()
    num_steps, goes_on = 0, True
    most = job.spec.max_steps
    while goes_on and (most is None or num_steps < most):
        num_due = MERGE_STEPS if most is None else min(MERGE_STEPS, most - num_steps)
        figures: list[StepFigures] = []
        outcomes: list[RebalanceOutcome] = []
        for _ in range(num_due):
            of_step, of_balancer = engine.step()
            figures.append(of_step)
            outcomes += of_balancer
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
        balancedness_before=outcome.balancedness_before,
        balancedness_after=outcome.balancedness_after,
        placement=outcome.placement,
    )


def _score(job: _Job) -> Scores:
    job.say(PhaseRecord("loss"))
    return score_in_lockstep(job.group, job.spread, job.held_out, len(job.kinds))


def _check(
    job: _Job, off: dict[int, Request], on: dict[int, Request]
) -> tuple[Scores | None, CheckRecord | None]:
    """Both None on other ranks than 0."""
    job.say(PhaseRecord("check"))
    plain: Any = None
    if job.group.rank == 0:
        plain = load_model(job.spec.model, _dtype(job.spec), job.group.device)
    vocabulary_size = job.spread.model.config.vocab_size
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
        tokens = torch.full((job.limits.max_new_tokens,), -1)
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
