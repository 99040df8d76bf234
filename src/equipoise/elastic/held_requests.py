"""Requests of one rank, as whoever is its controller must be told of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from equipoise.elastic.requests import read_sampling, write_delta
from equipoise.engine.requests import Delta, FinishReason, Request

HELD_S = 10.0
"""How long what has ended is still told of: its last words may have been lost with a controller."""


@dataclass
class _Held:
    given: dict[str, Any]
    generated: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    ended_at: float = 0.0


class HeldRequests:
    """Each request with all its tokens, until it has ended and was told of. Owner: one thread.

    Args:
        now: a clock; for tests.

    Attributes:
        keeps_all: whether what has ended is kept, as there is nobody to tell it.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._held: dict[str, _Held] = {}
        self.keeps_all = False

    def __contains__(self, request_id: str) -> bool:
        held = self._held.get(request_id)
        return held is not None and held.finish_reason is None

    def __len__(self) -> int:
        return sum(held.finish_reason is None for held in self._held.values())

    def take(self, given: dict[str, Any]) -> Request:
        """A request that was given to this rank, as `Assignment.to_json` wrote it."""
        self._held[given["id"]] = _Held(given, list(given["generated"]))
        return Request(
            given["id"],
            tuple(given["tokens"]),
            read_sampling(given["sampling"]),
            list(given["generated"]),
        )

    def note(self, delta: Delta) -> list[Any] | None:
        """Tokens of a request, as they travel to the controller; None where others have it now."""
        held = self._held.get(delta.request_id)
        if held is None:
            return None
        held.generated[delta.position :] = delta.tokens
        if delta.finish_reason is not None:
            held.finish_reason, held.ended_at = delta.finish_reason, self._now()
        return write_delta(delta, held.given["attempt"])

    def forget_old(self) -> None:
        """Let go of what has ended long ago, if it was told of."""
        if self.keeps_all:
            return
        until = self._now() - HELD_S
        for key in [k for k, h in self._held.items() if h.finish_reason and h.ended_at < until]:
            del self._held[key]

    def to_json(self) -> list[dict[str, Any]]:
        """Each as it was given, with its tokens so far and how it ended."""
        return [
            {**held.given, "generated": held.generated, "finish_reason": held.finish_reason}
            for held in self._held.values()
        ]
