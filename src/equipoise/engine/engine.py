"""The engine of one rank: requests in, tokens out, one forward pass per step.

Axis letters: B rows of a step, T tokens per row, V vocabulary.
"""

from __future__ import annotations

import inspect
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from equipoise.balancer import EplbState, RebalanceOutcome
from equipoise.engine.cache import RowCache
from equipoise.engine.figures import MIXED, NO_KIND, StepFigures
from equipoise.errors import ModelError
from equipoise.models.experts import ExpertParallelModel


@dataclass
class Request:
    """A prompt and what has become of it. Owner: the engine that it was submitted to.

    Attributes:
        prompt: its index among all prompts.
        kind: index of its kind of text.
        tokens: of the prompt, at least one.
        generated: so far, a token that ends the text included.
        logits: of each generated token [V] float32 on the CPU, where the engine keeps them.
    """

    prompt: int
    kind: int
    tokens: tuple[int, ...]
    generated: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class EngineLimits:
    """What an engine may hold.

    Attributes:
        max_batch_size: sequences in flight.
        max_new_tokens: per request.
        max_len: tokens of the longest request, generated ones included.
        end_tokens: tokens that end a text.
        keep_logits: whether requests keep the logits of their tokens.
    """

    max_batch_size: int
    max_new_tokens: int
    max_len: int
    end_tokens: frozenset[int] = frozenset()
    keep_logits: bool = False


@dataclass(frozen=True)
class _Batch:
    """One forward pass.

    Attributes:
        token_ids: [B, T] int64.
        positions: [B, T] int64, within each sequence.
        mask: bool, broadcast to [B, 1, T, keys], True where a token looks; None without a cache.
        valid: [B * T] bool, False for padding; None if there is none.
        last: [B] int64, where in its row each sequence's last token is.
        num_tokens: without padding.
    """

    token_ids: Tensor
    positions: Tensor
    mask: Tensor | None
    valid: Tensor | None
    last: Tensor
    num_tokens: int


class Engine:
    """Serves this rank's requests by greedy decoding, in lockstep with the other ranks.

    A step is a prefill of what has just been admitted, or one token for every running sequence,
    or, with neither, a dummy token that is sent nowhere. Owner: the forward thread.

    Args:
        spread: the model; its maps and recorder are this engine's to step.
        rank: this rank's number, so that ranks start at other global positions.
        limits: what it may hold.
        balancer: stepped after every forward pass; None serves without balancing.
    Raises: ModelError if the model attends to a window shorter than the longest request.
    """

    def __init__(
        self,
        spread: ExpertParallelModel,
        rank: int,
        limits: EngineLimits,
        balancer: EplbState | None = None,
    ) -> None:
        self._spread = spread
        self._limits = limits
        self._balancer = balancer
        self._model = spread.model
        self._device = spread.maps.slot_to_expert.device
        window = getattr(self._model.config, "sliding_window", None)
        if window is not None and window < limits.max_len:
            raise ModelError(
                f"the model attends to the last {window} tokens only, and a request may have "
                f"{limits.max_len}: windows are not served, ask for shorter requests"
            )
        self._cache = RowCache(limits.max_batch_size, limits.max_len)
        # transformers renames the argument in 5.24.
        names = inspect.signature(self._model.base_model.forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"
        self._queue: deque[Request] = deque()
        self._running: list[Request] = []
        self._position = rank

    @property
    def has_work(self) -> bool:
        """Whether a request is queued or running."""
        return bool(self._queue or self._running)

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests; they are served in this order. Collective: none."""
        self._queue.extend(requests)

    def step(self) -> tuple[StepFigures, tuple[RebalanceOutcome, ...]]:
        """Run one forward pass, and balance if a plan is due.

        Returns:
            What the step did on this rank, and what balancing did on all.
        Collective: every rank of the group, equally often.
        Raises: TransferError or MembershipError within the deadline if a rank does not take part.
        """
        started_s, cpu_s = time.perf_counter(), self._spread.expert_cpu_s
        placement = self._spread.maps.placement
        with torch.inference_mode():
            admitted = self._admit()
            if admitted:
                batch, first_row = self._batch_prefill(admitted), len(self._running)
                self._running += admitted
            else:
                batch, first_row = self._batch_decode() if self._running else self._dummy(), 0
            logits = self._forward(batch)
            kind = self._find_kind()
            num_new = self._take(logits, first_row) if self._running else 0
        slot_count = self._spread.recorder.counts.clone()
        outcomes = self._close_step()
        figures = StepFigures(
            placement=placement,
            slot_count=slot_count,
            num_tokens=batch.num_tokens,
            num_new_tokens=num_new,
            kind=kind,
            expert_cpu_s=self._spread.expert_cpu_s - cpu_s,
            step_s=time.perf_counter() - started_s,
        )
        return figures, outcomes

    def _close_step(self) -> tuple[RebalanceOutcome, ...]:
        if self._balancer is not None:
            return self._balancer.step()
        self._spread.recorder.clear()
        return ()

    def _admit(self) -> list[Request]:
        free = self._limits.max_batch_size - len(self._running)
        return [self._queue.popleft() for _ in range(min(free, len(self._queue)))]

    def _batch_prefill(self, admitted: Sequence[Request]) -> _Batch:
        """Right-padded: no token looks to its right, so padding needs no mask of its own."""
        lengths = [len(request.tokens) for request in admitted]
        longest = max(lengths)
        rows = [[*request.tokens, *[0] * (longest - len(request.tokens))] for request in admitted]
        length = torch.tensor(lengths)
        position = torch.arange(longest)
        self._cache.prefill(len(self._running))
        return _Batch(
            token_ids=self._move(torch.tensor(rows)),
            positions=self._move(position.expand(len(rows), -1)),
            mask=self._move(position[:, None] >= position)[None, None],
            valid=self._move((position < length[:, None]).flatten()),
            last=self._move(length - 1),
            num_tokens=sum(lengths),
        )

    def _batch_decode(self) -> _Batch:
        tokens = [request.generated[-1] for request in self._running]
        positions = [len(r.tokens) + len(r.generated) - 1 for r in self._running]
        position = self._move(torch.tensor(positions))
        longest = max(positions) + 1
        self._cache.decode(position, longest)
        key = torch.arange(longest, device=self._device)
        return _Batch(
            token_ids=self._move(torch.tensor(tokens))[:, None],
            positions=position[:, None],
            mask=(key <= position[:, None])[:, None, None, :],
            valid=None,
            last=torch.zeros_like(position),
            num_tokens=len(tokens),
        )

    def _dummy(self) -> _Batch:
        zero = torch.zeros(1, 1, dtype=torch.int64, device=self._device)
        nowhere = torch.zeros(1, dtype=torch.bool, device=self._device)
        return _Batch(zero, zero, None, nowhere, zero[0], num_tokens=0)

    def _forward(self, batch: _Batch) -> Tensor:
        """[B, V] float32, logits behind each row's last token."""
        cache = None if batch.mask is None else self._cache
        with self._spread.route(batch.valid, self._position):
            hidden = self._model.base_model(
                input_ids=batch.token_ids,
                attention_mask=batch.mask,
                position_ids=batch.positions,
                use_cache=cache is not None,
                **{self._cache_name: cache},
            ).last_hidden_state
        self._position += batch.token_ids.numel()
        row = torch.arange(hidden.shape[0], device=self._device)
        head = self._model.get_output_embeddings()
        logits: Tensor = head(hidden[row, batch.last]).float()
        return logits

    def _take(self, logits: Tensor, first_row: int) -> int:
        """Give each row of the step its token, and let finished sequences go; count new tokens."""
        rows = self._running[first_row:]
        tokens = logits.argmax(dim=-1).tolist()
        kept = logits.cpu() if self._limits.keep_logits else None
        for index, (request, token) in enumerate(zip(rows, tokens, strict=True)):
            request.generated.append(token)
            if kept is not None:
                request.logits.append(kept[index])
        for row in range(len(self._running) - 1, first_row - 1, -1):
            if self._is_finished(self._running[row]):
                self._free(row)
        return len(tokens)

    def _is_finished(self, request: Request) -> bool:
        return (
            len(request.generated) >= self._limits.max_new_tokens
            or request.generated[-1] in self._limits.end_tokens
        )

    def _free(self, row: int) -> None:
        last = self._running.pop()
        if row < len(self._running):
            self._running[row] = last
            self._cache.move(len(self._running), row)

    def _find_kind(self) -> int:
        kinds = {request.kind for request in self._running}
        return MIXED if len(kinds) > 1 else next(iter(kinds), NO_KIND)

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)
