"""The engine of one rank: requests in, tokens out, one forward pass per step."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from equipoise.balancer import RebalanceOutcome
from equipoise.engine.cache import CacheMemory
from equipoise.engine.detokenizer import TextStream
from equipoise.engine.figures import SetLoad, StepFigures, StepResult
from equipoise.engine.forward import Forward
from equipoise.engine.requests import Delta, FinishReason, Request
from equipoise.engine.sampling import choose_tokens
from equipoise.engine.schedule import Schedule, Sequence
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

    A step gives every running sequence a token and takes some of the prompts of new ones; requests
    join and leave between steps. A rank without requests sends a dummy token nowhere.

    After an error, requests are as the last step that ended left them: they go on once another
    generation is adopted, or are handed over by `evict`.

    Args:
        parallel: the model of the generation that serves.
        limits: what it may hold.
        tokenizer: of the model; without, requests must have no stop strings.
        balance: whether steps are the balancer's too; without, nothing is counted or moved.
        graphs: whether decode steps are CUDA graphs, where dispatch allows it.
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
        graphs: bool = True,
    ) -> None:
        self.limits = limits
        self._parallel, self._tokenizer, self._balance = parallel, tokenizer, balance
        num_rows, end = limits.max_batch_size, limits.end_tokens
        self._forward = Forward(parallel, num_rows, limits.max_len, graphs=graphs)
        self._schedule = Schedule(num_rows, limits.prefill_chunk, self._forward.cache.move)
        self._end_tokens = find_end_tokens(parallel.model) if end is None else end
        # Kept beyond an error: each token is told, and once.
        self._deltas: list[Delta] = []

    @property
    def memory(self) -> CacheMemory:
        """What the cache takes."""
        return self._forward.cache.memory

    @property
    def has_work(self) -> bool:
        """Whether a request is queued or running."""
        return len(self._schedule) > 0

    @property
    def num_requests(self) -> int:
        """Queued and running."""
        return len(self._schedule)

    def submit(self, *requests: Request) -> None:
        """Queue requests, new ones or with the tokens that they got elsewhere, behind the others.

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
        """End a request, if it is here: a delta of the next step says so. Collective: none."""
        for request in self.evict([request_id]):
            self._deltas.append(Delta(request.id, len(request.generated), (), "cancelled"))

    def evict(self, request_ids: Iterable[str] | None = None) -> list[Request]:
        """Hand requests over, to be run again elsewhere from their tokens so far.

        Args:
            request_ids: which; None for all that are queued or running.
        Returns: those that were here, running ones first. Collective: none.
        """
        wanted = None if request_ids is None else set(request_ids)
        return [sequence.request for sequence in self._schedule.remove(wanted)]

    def adopt(self, parallel: ParallelModel) -> None:
        """Serve in another generation from the next step on; requests and cache stay.

        Collective: none; every rank of the generation before its first step.
        """
        assert parallel.model is self._parallel.model, "a generation of another model"
        self._parallel = parallel
        self._forward.adopt(parallel)

    def step(self) -> StepResult:
        """Run one forward pass, and the balancer's step.

        Collective: every rank of the group, equally often.
        Raises: TransferError or MembershipError within the deadline if a rank does not take part.
        """
        started_s, cpu_s = time.perf_counter(), self._parallel.spread.expert_cpu_s
        work = self._schedule.plan()
        logits, getters = self._forward.run(work)
        tokens = choose_tokens(logits, [sequence.request for sequence in getters])
        sets = self._parallel.spread.sets if self.limits.keep_load else ()
        loads = tuple(SetLoad(one.maps.placement, one.recorder.counts.clone()) for one in sets)
        # On a GPU the balancer does its part while the device computes.
        balance_s, outcomes = self._balance_step()
        self._forward.check()
        self._take(tokens.tolist(), logits, getters)
        self._schedule.advance(work)
        figures = StepFigures(
            num_tokens=work.num_tokens,
            num_new_tokens=len(getters),
            kinds=frozenset(sequence.request.kind for sequence, _ in work.parts),
            expert_cpu_s=self._parallel.spread.expert_cpu_s - cpu_s,
            loads=loads,
            step_s=time.perf_counter() - started_s,
            balance_s=balance_s,
        )
        return self._tell(figures, outcomes)

    def tick(self) -> StepResult:
        """Close a step in which no rank has anything to do, without a forward pass.

        Rebalances that are under way go on. Collective and Raises: as `step`.
        """
        taken_s, outcomes = self._balance_step()
        return self._tell(StepFigures(step_s=taken_s, balance_s=taken_s), outcomes)

    def _balance_step(self) -> tuple[float, tuple[RebalanceOutcome, ...]]:
        """Close the forward pass that is under way; and the seconds that it took."""
        started_s = time.perf_counter()
        outcomes: tuple[RebalanceOutcome, ...] = ()
        if self._balance:
            outcomes = self._parallel.step()
        else:
            for one in self._parallel.spread.sets:
                one.recorder.clear()
        return time.perf_counter() - started_s, outcomes

    def _tell(self, figures: StepFigures, outcomes: tuple[RebalanceOutcome, ...]) -> StepResult:
        deltas, self._deltas = tuple(self._deltas), []
        return StepResult(deltas, figures, outcomes)

    def _check(self, request: Request, known: set[str]) -> None:
        num_tokens, num_more = len(request.tokens), request.sampling.max_new_tokens
        problem = None
        if request.id in known:
            problem = "has not ended yet: take another id"
        elif not num_tokens:
            problem = "is empty: it needs at least one token"
        elif num_tokens + num_more > self.limits.max_len:
            room = f"the engine takes {self.limits.max_len}"
            problem = f"has {num_tokens} tokens and asks for {num_more} more, {room}"
        elif len(request.generated) >= num_more:
            problem = "has all of its tokens already"
        elif request.sampling.stop and self._tokenizer is None:
            problem = "has stop strings, and the engine no tokenizer: give it one"
        if problem is not None:
            raise ConfigError(f"request {request.id!r} {problem}")

    def _take(self, tokens: list[int], logits: Tensor, getters: list[Sequence]) -> None:
        """Give sequences their tokens, and find out which have ended."""
        kept = logits.cpu() if self.limits.keep_logits else None
        for index, (sequence, token) in enumerate(zip(getters, tokens, strict=True)):
            request = sequence.request
            request.generated.append(token)
            if kept is not None:
                request.logits.append(kept[index])
            end = sequence.finish_reason = self._find_end(sequence, token)
            self._deltas.append(Delta(request.id, len(request.generated) - 1, (token,), end))

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
    return frozenset([end] if isinstance(end, int) else end or ())
