"""Requests as the controller keeps them: who has each, and which tokens of it were delivered."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from equipoise.elastic.service import Deliver, QueueFull, RequestFailed, ServiceRequest
from equipoise.engine.requests import Delta, FinishReason, SamplingParams
from equipoise.errors import ConfigError

Delivery = tuple[Deliver, Delta | RequestFailed]
"""What is to be called, outside of any lock, with what."""


@dataclass(frozen=True)
class Assignment:
    """A request given to a rank.

    Attributes:
        rank: its name.
        request: what was asked for.
        generated: tokens so far, where it is run again.
        attempt: counted up at each assignment of the request; what a rank says of an earlier one
            does not count.
    """

    rank: str
    request: ServiceRequest
    generated: tuple[int, ...]
    attempt: int

    def to_json(self) -> dict[str, Any]:
        """As it travels to the rank."""
        return {
            "id": self.request.id,
            "tokens": list(self.request.tokens),
            "sampling": asdict(self.request.sampling),
            "generated": list(self.generated),
            "attempt": self.attempt,
        }


@dataclass
class _Entry:
    request: ServiceRequest
    # None of a request that was taken over, until somebody asks for its tokens.
    deliver: Deliver | None
    generated: list[int] = field(default_factory=list)
    rank: str | None = None
    attempt: int = 0


class RequestTable:
    """Unfinished requests, each waiting in the queue or held by one rank. Any thread may call.

    Args:
        queue_limit: requests that may wait; those that come back from a rank wait beyond it.
    """

    def __init__(self, queue_limit: int) -> None:
        self.queue_limit = queue_limit
        self._lock = threading.Lock()
        self._is_empty = threading.Condition(self._lock)
        self._held: Counter[str] = Counter()
        self._entries: dict[str, _Entry] = {}
        self._queue: deque[str] = deque()
        # Tokens and ends of requests that were taken over, and that nobody has asked for yet.
        self._ended: dict[str, tuple[list[int], FinishReason]] = {}
        self._counts = dict.fromkeys(
            ("submitted", "finished", "cancelled", "failed", "rerun"), 0
        ) | {"prompt_tokens": 0, "generated_tokens": 0}

    def add(self, request: ServiceRequest, deliver: Deliver) -> None:
        """Put a request at the end of the queue.

        Raises: QueueFull; ConfigError if its id is in use.
        """
        with self._lock:
            if request.id in self._entries:
                raise ConfigError(f"request {request.id!r} has not ended yet: take another id")
            if len(self._queue) >= self.queue_limit:
                raise QueueFull(f"{len(self._queue)} requests wait already: come again later")
            self._ended.pop(request.id, None)
            self._entries[request.id] = _Entry(request, deliver)
            self._queue.append(request.id)
            self._counts["submitted"] += 1
            self._counts["prompt_tokens"] += len(request.tokens)

    def assign(self, capacities: Mapping[str, int]) -> list[Assignment]:
        """Give waiting requests to the ranks with most room, first come first served.

        Args:
            capacities: by name of each rank that takes requests, how many it may hold.
        """
        with self._lock:
            rooms = {name: most - self._held[name] for name, most in capacities.items()}
            given = []
            while self._queue and rooms:
                rank = max(rooms, key=lambda name: rooms[name])
                if rooms[rank] < 1:
                    break
                rooms[rank] -= 1
                entry = self._entries[self._queue.popleft()]
                entry.rank = rank
                entry.attempt += 1
                self._held[rank] += 1
                given.append(Assignment(rank, entry.request, tuple(entry.generated), entry.attempt))
            return given

    def take(self, rank: str, attempt: int, delta: Delta) -> list[Delivery]:
        """What a rank says of a request: pass on what is new of it.

        Args:
            rank: that says it.
            attempt: which assignment it speaks of; an old one does not count.
            delta: new tokens; those delivered before are left out.
        Returns:
            at most one delivery.
        Raises: ValueError if tokens are missing before these.
        """
        with self._lock:
            entry = self._entries.get(delta.request_id)
            if entry is None or entry.rank != rank or entry.attempt != attempt:
                return []
            known = len(entry.generated)
            if delta.position > known:
                raise ValueError(
                    f"{rank} says token {delta.position} of request {delta.request_id!r} next, "
                    f"but {known} came before"
                )
            tokens = delta.tokens[known - delta.position :]
            if not tokens and delta.finish_reason is None:
                return []
            entry.generated.extend(tokens)
            self._counts["generated_tokens"] += len(tokens)
            if delta.finish_reason is not None:
                self._forget(delta.request_id)
                ended = "cancelled" if delta.finish_reason == "cancelled" else "finished"
                self._counts[ended] += 1
            if entry.deliver is None:
                if delta.finish_reason is not None:
                    self._ended[delta.request_id] = entry.generated, delta.finish_reason
                return []
            return [(entry.deliver, Delta(delta.request_id, known, tokens, delta.finish_reason))]

    def adopt(self, rank: str, told: Mapping[str, Any]) -> bool:
        """Take over a request of a controller that has gone, as a rank tells of it.

        Args:
            rank: that tells.
            told: what it was given, as `Assignment.to_json` wrote it, its tokens so far, and its
                `finish_reason`.
        Returns:
            Whether the rank has it; False where another was given it later.
        """
        request = ServiceRequest(told["id"], tuple(told["tokens"]), read_sampling(told["sampling"]))
        with self._lock:
            before = self._entries.get(request.id)
            if request.id in self._ended or (before and before.attempt >= told["attempt"]):
                return False
            if before is not None:
                self._forget(request.id)
            if told["finish_reason"] is not None:
                self._ended[request.id] = list(told["generated"]), told["finish_reason"]
                return True
            self._entries[request.id] = _Entry(
                request, None, list(told["generated"]), rank, told["attempt"]
            )
            self._held[rank] += 1
            return True

    def list_unclaimed(self) -> tuple[str, ...]:
        """Ids of requests that were taken over, and that nobody has asked for yet."""
        with self._lock:
            waiting = [key for key, entry in self._entries.items() if entry.deliver is None]
            return (*waiting, *self._ended)

    def take_up(self, request_id: str, position: int, deliver: Deliver) -> list[Delivery]:
        """Have a request that was taken over delivered, from a token on.

        Args:
            request_id: which.
            position: index of the first token that is wanted.
            deliver: gets its tokens, once and in order, and its end.
        Returns:
            at most one delivery: of what has come by now.
        Raises: ConfigError if it is none that nobody has asked for, or has no such token yet.
        """
        with self._lock:
            entry = self._entries.get(request_id)
            reason: FinishReason | None = None
            if request_id in self._ended:
                generated, reason = self._ended[request_id]
            elif entry is not None and entry.deliver is None:
                generated = entry.generated
            else:
                raise ConfigError(
                    f"request {request_id!r} was not taken over, or has been asked for: one that "
                    "waited for a rank went with the controller before; ask for it anew"
                )
            if not 0 <= position <= len(generated):
                raise ConfigError(
                    f"request {request_id!r} has {len(generated)} tokens so far, and {position} "
                    "is behind them"
                )
            if entry is not None:
                entry.deliver = deliver
            self._ended.pop(request_id, None)
            tokens = tuple(generated[position:])
        if not tokens and reason is None:
            return []
        return [(deliver, Delta(request_id, position, tokens, reason))]

    def release(self, rank: str) -> int:
        """Take a rank's requests away from it: they wait in front of all others.

        Returns:
            How many.
        """
        with self._lock:
            held = [key for key, entry in self._entries.items() if entry.rank == rank]
            for key in held:
                self._entries[key].rank = None
            del self._held[rank]
            self._queue.extendleft(reversed(held))
            self._counts["rerun"] += len(held)
            return len(held)

    def cancel(self, request_id: str) -> tuple[list[Delivery], str | None]:
        """End a request that waits; of one that a rank has, find that rank.

        Returns:
            the delivery of one that waited; the name of the rank that must be told otherwise.
        """
        with self._lock:
            self._ended.pop(request_id, None)
            entry = self._entries.get(request_id)
            if entry is None:
                return [], None
            entry.deliver = entry.deliver or _ignore
            if entry.rank is not None:
                return [], entry.rank
            self._queue.remove(request_id)
            self._forget(request_id)
            self._counts["cancelled"] += 1
            return [(entry.deliver, Delta(request_id, len(entry.generated), (), "cancelled"))], None

    def fail(self, reason: str, request_ids: Iterable[str] | None = None) -> list[Delivery]:
        """Give requests up, all of them by default."""
        with self._lock:
            chosen = list(self._entries) if request_ids is None else list(request_ids)
            failed = [(key, self._forget(key)) for key in chosen if key in self._entries]
            gone = {key for key, _ in failed}
            self._queue = deque(key for key in self._queue if key not in gone)
            self._counts["failed"] += len(failed)
        return [(entry.deliver or _ignore, RequestFailed(key, reason)) for key, entry in failed]

    def held(self) -> dict[str, int]:
        """Requests by rank; a rank without any counts none."""
        with self._lock:
            return dict(self._held)

    def wait_empty(self, timeout_s: float) -> bool:
        """Wait until no request is unfinished; whether that came in time."""
        with self._is_empty:
            return self._is_empty.wait_for(lambda: not self._entries, timeout_s)

    def counts(self) -> dict[str, int]:
        """Totals by the names of ServiceTotals."""
        with self._lock:
            return dict(self._counts)

    @property
    def num_waiting(self) -> int:
        """Requests that no rank has."""
        with self._lock:
            return len(self._queue)

    @property
    def num_held(self) -> int:
        """Requests that ranks have."""
        with self._lock:
            return self._held.total()

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or that a rank has."""
        with self._lock:
            return len(self._entries)

    def _forget(self, request_id: str) -> _Entry:
        entry = self._entries.pop(request_id)
        if entry.rank is not None:
            self._held[entry.rank] -= 1
        if not self._entries:
            self._is_empty.notify_all()
        return entry


def _ignore(event: Delta | RequestFailed) -> None:
    """For requests that nobody wants the tokens of."""


def read_sampling(values: Mapping[str, Any]) -> SamplingParams:
    """Sampling parameters as they travelled: JSON has no tuples."""
    options: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }
    return SamplingParams(**options)


def write_delta(delta: Delta, attempt: int) -> list[Any]:
    """A delta as it travels: there are many, so without names."""
    return [delta.request_id, attempt, delta.position, list(delta.tokens), delta.finish_reason]


def read_delta(values: list[Any]) -> tuple[int, Delta]:
    """The attempt and the delta that `write_delta` wrote."""
    request_id, attempt, position, tokens, finish_reason = values
    return attempt, Delta(request_id, position, tuple(tokens), finish_reason)
