"""The engine of one rank: requests in, tokens out, one forward pass per step.

Axis letters: N tokens of a step, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from equipoise.balancer import RebalanceOutcome
from equipoise.engine.attention import Attention, Layout
from equipoise.engine.cache import CacheMemory, KVCache, find_memory
from equipoise.engine.detokenizer import TextStream
from equipoise.engine.figures import SetLoad, StepFigures, StepResult
from equipoise.engine.requests import Delta, FinishReason, Request
from equipoise.engine.sampling import choose_tokens
from equipoise.engine.schedule import Schedule, Sequence, Work
from equipoise.errors import ConfigError
from equipoise.models.parallel import ParallelModel


@dataclass(frozen=True)
class EngineLimits:
    """What an engine may hold, and what it keeps.

    Attributes:
        max_batch_size: sequences in flight.
        max_len: tokens of the longest request, generated ones included.
        prefill_chunk: tokens of prompts in one step, beside those of running sequences.
        end_tokens: tokens that end a text; None for those of the model's generation_config.
        keep_logits: whether requests keep the logits of their tokens.
        keep_load: whether figures have the load of their step.
    Raises: ConfigError, naming the value, if it is below 1.
    """

    max_batch_size: int
    max_len: int
    prefill_chunk: int = 512
    end_tokens: frozenset[int] | None = None
    keep_logits: bool = False
    keep_load: bool = False

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_len", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


class Engine:
    """Serves this rank's requests, in lockstep with the other ranks. Owner: the forward thread.

    A step gives every running sequence a token and takes some of the prompts of new ones. A rank
    without requests sends a dummy token nowhere. Requests join and leave between steps.

    After an error, requests are as the last step that ended left them: they go on once another
    generation is adopted, or are handed over by `evict`.

    Args:
        parallel: the model of the generation that serves.
        limits: what it may hold.
        tokenizer: of the model; without, requests must have no stop strings.
        balance: whether steps are the balancer's too; without, nothing is counted or moved.
    Raises: ConfigError, before any of it is taken, if the cache has no room; ModelError if the
        model cannot be served.
    """

    def __init__(
        self,
        parallel: ParallelModel,
        limits: EngineLimits,
        *,
        tokenizer: Any = None,
        balance: bool = True,
    ) -> None:
        self.limits = limits
        self._parallel, self._tokenizer, self._balance = parallel, tokenizer, balance
        self._device = parallel.state.group.device
        self._attention = Attention(parallel.model)
        shapes = self._attention.find_shapes(parallel)
        memory = find_memory(shapes, limits.max_batch_size, limits.max_len, self._device)
        memory.check()
        self._cache = KVCache(shapes, memory)
        self._schedule = Schedule(limits.max_batch_size, limits.prefill_chunk, self._cache.move)
        self._end_tokens = (
            find_end_tokens(parallel.model) if limits.end_tokens is None else limits.end_tokens
        )
        # Ranks start elsewhere, so that replicas take turns over ranks as well as over tokens.
        self._position = parallel.state.group.rank
        # Kept beyond an error: each token is told, and once.
        self._deltas: list[Delta] = []

    @property
    def memory(self) -> CacheMemory:
        """What the cache takes."""
        return self._cache.memory

    @property
    def has_work(self) -> bool:
        """Whether a request is queued or running."""
        return bool(len(self._schedule))

    @property
    def num_requests(self) -> int:
        """Queued and running."""
        return len(self._schedule)

    def submit(self, *requests: Request) -> None:
        """Queue requests; they are begun in this order, from the next step on.

        Args:
            requests: new, or with the tokens that they got elsewhere so far.
        Collective: none.
        Raises: ConfigError, before any is queued, if one cannot be served or its id is in use.
        """
        known = {sequence.request.id for sequence in self._schedule}
        for request in requests:
            self._check(request, known)
            known.add(request.id)
        for request in requests:
            stream = None
            if request.sampling.stop:
                stream = TextStream(self._tokenizer, request.sampling.stop)
                stream.push(request.generated)
            self._schedule.add(Sequence(request, stream))

    def cancel(self, request_id: str) -> None:
        """End a request: a delta of the next step or tick says so. An unknown one is ignored.

        Collective: none.
        """
        for request in self.evict([request_id]):
            self._deltas.append(Delta(request.id, len(request.generated), (), "cancelled"))

    def evict(self, request_ids: Iterable[str] | None = None) -> list[Request]:
        """Hand requests over, to be run again elsewhere from their tokens so far.

        Args:
            request_ids: which; None for all that are queued or running. Unknown ones are ignored.
        Returns:
            Those that were here, running ones first.
        Collective: none.
        """
        wanted = None if request_ids is None else set(request_ids)
        return [sequence.request for sequence in self._schedule.remove(wanted)]

    def adopt(self, parallel: ParallelModel) -> None:
        """Serve in another generation from the next step on; requests and cache stay.

        Args:
            parallel: of the same model on the same device.
        Collective: none; every rank of the generation before its first step.
        """
        assert parallel.model is self._parallel.model, "a generation of another model"
        self._parallel = parallel

    def step(self) -> StepResult:
        """Run one forward pass, and the balancer's step.

        Returns:
            What the step did on this rank, and what balancing did on all.
        Collective: every rank of the group, equally often.
        Raises: TransferError or MembershipError within the deadline if a rank does not take part.
        """
        started_s, cpu_s = time.perf_counter(), self._parallel.spread.expert_cpu_s
        work = self._schedule.plan()
        kinds = frozenset(sequence.request.kind for sequence, _ in work)
        with torch.inference_mode():
            logits, getters = self._forward(work)
            for dispatcher in self._parallel.dispatchers:
                dispatcher.check()
            self._take(logits, getters)
        self._schedule.advance(work)
        cpu_s = self._parallel.spread.expert_cpu_s - cpu_s
        figures = StepFigures(
            num_tokens=work.num_tokens,
            num_new_tokens=len(getters),
            kinds=kinds,
            expert_cpu_s=cpu_s,
            loads=self._collect_loads() if self.limits.keep_load else (),
        )
        return self._close(started_s, figures)

    def tick(self) -> StepResult:
        """Close a step in which no rank has anything to do, without a forward pass.

        Rebalances that are under way go on, and come to their end.

        Collective: every rank of the group, equally often.
        Raises: as `step`.
        """
        return self._close(time.perf_counter(), StepFigures())

    def _close(self, started_s: float, figures: StepFigures) -> StepResult:
        before_s = time.perf_counter()
        outcomes = self._step_balancer()
        ended_s = time.perf_counter()
        deltas, self._deltas = tuple(self._deltas), []
        figures = replace(figures, step_s=ended_s - started_s, balance_s=ended_s - before_s)
        return StepResult(deltas, figures, outcomes)

    def _step_balancer(self) -> tuple[RebalanceOutcome, ...]:
        if self._balance:
            return self._parallel.step()
        for one in self._parallel.spread.sets:
            one.recorder.clear()
        return ()

    def _collect_loads(self) -> tuple[SetLoad, ...]:
        sets = self._parallel.spread.sets
        return tuple(SetLoad(one.maps.placement, one.recorder.counts.clone()) for one in sets)

    def _check(self, request: Request, known: set[str]) -> None:
        most = len(request.tokens) + request.sampling.max_new_tokens
        if request.id in known:
            raise ConfigError(f"request {request.id!r} has not ended yet: take another id")
        if not request.tokens:
            raise ConfigError(f"request {request.id!r} is empty: it needs at least one token")
        if most > self.limits.max_len:
            raise ConfigError(
                f"request {request.id!r} has {len(request.tokens)} tokens and asks for "
                f"{request.sampling.max_new_tokens} more, the engine takes {self.limits.max_len}"
            )
        if len(request.generated) >= request.sampling.max_new_tokens:
            raise ConfigError(f"request {request.id!r} has all of its tokens already")
        if request.sampling.stop and self._tokenizer is None:
            raise ConfigError(
                f"request {request.id!r} has stop strings, and the engine no tokenizer: give it one"
            )

    def _forward(self, work: Work) -> tuple[Tensor, list[Sequence]]:
        """[sequences that get a token, V] float32, and these."""
        if not work.num_tokens:
            return self._run(torch.zeros(3, 1, dtype=torch.int64), None), []
        getters, columns, lasts = [], [], []
        for sequence, chunk in work:
            tokens = sequence.pending(chunk.length)
            columns += [
                (token, chunk.row, chunk.start + offset) for offset, token in enumerate(tokens)
            ]
            if chunk.length == sequence.num_pending:
                getters.append(sequence)
                lasts.append(len(columns) - 1)
        hidden = self._run(torch.tensor(columns).T, work)[lasts]
        logits: Tensor = self._parallel.model.get_output_embeddings()(hidden).float()
        return logits, getters

    def _run(self, columns: Tensor, work: Work | None) -> Tensor:
        """[N, hidden] of tokens, rows and positions [3, N]; of nobody's token without work."""
        model = self._parallel.model
        tokens, rows, positions = columns.to(self._device, non_blocking=True)
        layout = valid = None
        if work is None:
            valid = torch.zeros(1, dtype=torch.bool, device=self._device)
        else:
            longest = max((one.num_cached + 1 for one in work.decoding), default=0)
            layout = Layout(rows, positions, len(work.decoding), longest, work.chunks)
        with (
            self._parallel.route(valid, self._position),
            self._attention.serve(self._cache, layout) as named,
        ):
            hidden = model.base_model(
                input_ids=tokens[None], position_ids=positions[None], **named
            ).last_hidden_state
        self._position += tokens.numel()
        states: Tensor = hidden[0]
        return states

    def _take(self, logits: Tensor, getters: list[Sequence]) -> None:
        """Give sequences their tokens, and find out which have ended."""
        if not getters:
            return
        tokens = choose_tokens(logits, [sequence.request for sequence in getters])
        kept = logits.cpu() if self.limits.keep_logits else None
        for index, (sequence, token) in enumerate(zip(getters, tokens, strict=True)):
            request = sequence.request
            position = len(request.generated)
            request.generated.append(token)
            if kept is not None:
                request.logits.append(kept[index])
            sequence.finish_reason = self._find_end(sequence, token)
            self._deltas.append(Delta(request.id, position, (token,), sequence.finish_reason))

    def _find_end(self, sequence: Sequence, token: int) -> FinishReason | None:
        sampling = sequence.request.sampling
        if token in self._end_tokens and not sampling.ignore_end:
            return "stop"
        if sequence.stream is not None and sequence.stream.push([token]).stopped:
            return "stop"
        if len(sequence.request.generated) == sampling.max_new_tokens:
            return "length"
        return None


def find_end_tokens(model: Any) -> frozenset[int]:
    """Tokens that end a text, as the model's generation_config says. Collective: none."""
    end = model.generation_config.eos_token_id
    if end is None:
        return frozenset()
    return frozenset([end] if isinstance(end, int) else end)
