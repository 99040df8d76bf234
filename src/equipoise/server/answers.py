"""Tokens from the service's threads to the event loop, and there into text."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from dataclasses import dataclass
from typing import Literal

from equipoise.elastic.service import (
    QueueFull,
    RequestFailed,
    Service,
    ServiceRequest,
)
from equipoise.engine.detokenizer import TextStream
from equipoise.engine.requests import Delta, FinishReason
from equipoise.errors import ConfigError
from equipoise.server.refusals import Refusal

Item = Delta | RequestFailed
Cut = Literal["gone", "late"]
"""The client left, or time is up."""


class Mailbox:
    """Carries what a service delivers to its answers, waking the event loop once for many.

    Args:
        loop: that the answers are read on.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._items: deque[tuple[Answer, Item]] = deque()
        self._is_due = False

    def put(self, answer: Answer, item: Item) -> None:
        """Pass something on. Any thread may call; it never waits and never raises."""
        with self._lock:
            self._items.append((answer, item))
            if self._is_due:
                return
            self._is_due = True
        with contextlib.suppress(RuntimeError):  # the loop has ended, and all who read with it
            self._loop.call_soon_threadsafe(self._empty)

    def _empty(self) -> None:
        with self._lock:
            items, self._items = self._items, deque()
            self._is_due = False
        for answer, item in items:
            answer.take(item)


@dataclass(frozen=True)
class Piece:
    """What an answer has grown by.

    Attributes:
        text: may be empty.
        finish_reason: why it has ended; None while it goes on.
    """

    text: str
    finish_reason: FinishReason | None


class Answer:
    """A request at the service, and what comes of it. Owner: the event loop.

    Args:
        service: that serves it.
        mailbox: what its tokens come by.
        request: what is asked.
        text: makes text of its tokens.
    """

    def __init__(
        self, service: Service, mailbox: Mailbox, request: ServiceRequest, text: TextStream
    ) -> None:
        self._service, self._mailbox = service, mailbox
        self._request, self._text = request, text
        self._items: deque[Item] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self.why_cut: Cut | None = None
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None

    def submit(self) -> None:
        """Have it served.

        Raises: Refusal if the service does not take it; ServiceClosed if it takes none.
        """
        try:
            self._service.submit(self._request, lambda item: self._mailbox.put(self, item))
        except QueueFull as error:
            raise Refusal(429, str(error), code="queue_full", retry_after_s=1) from error
        except ConfigError as error:
            raise Refusal(400, str(error)) from error

    def take(self, item: Item) -> None:
        """Get something from the mailbox."""
        self._items.append(item)
        self._wake()

    def cut(self, why: Cut) -> None:
        """Have `read` wait no longer, and say that it was cut."""
        self.why_cut = self.why_cut or why
        self._wake()

    async def read(self) -> Piece | None:
        """Everything that has come since the last call, waiting until there is something.

        Returns:
            A piece, of many tokens if many have come; None if it was cut.
        Raises: Refusal if the service gave the request up.
        """
        while not self._items and self.why_cut is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self.why_cut is not None:
            return None
        tokens: list[int] = []
        for item in self._items:
            if isinstance(item, RequestFailed):
                self.finish_reason = "cancelled"
                raise Refusal(503, item.reason, code="request_failed", retry_after_s=1)
            tokens += item.tokens
            self.finish_reason = item.finish_reason
        if self.finish_reason == "cancelled":  # by nobody here
            raise Refusal(503, "the service ended it", code="request_failed", retry_after_s=1)
        self._items.clear()
        self.num_tokens += len(tokens)
        text, _ = self._text.push(tokens)
        if self.finish_reason is not None:
            text += self._text.finish()
        return Piece(text, self.finish_reason)

    def drop(self) -> None:
        """Have the service end it, unless it has ended."""
        if self.finish_reason is None:
            self._service.cancel(self._request.id)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        self._waiter = None
