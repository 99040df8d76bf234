"""An answer that is being read: the client that may leave, the clock, and the events."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from equipoise.server.answers import Answer, Cut, Piece
from equipoise.server.exchange import Exchange, find_exchange
from equipoise.server.forms import Form, count_usage
from equipoise.server.metrics import HttpFigures
from equipoise.server.refusals import Refusal, write_error_event
from equipoise.server.settings import ServerSettings

_ERROR_S = 1.0
"""For an event that says that time is up."""


class Reading:
    """Reads an answer to its end, or until nobody wants it any more. Owner: the event loop.

    Args:
        answer: that was submitted.
        exchange: is told how it goes.
        settings: of the server.
        figures: count it.
    """

    def __init__(
        self, answer: Answer, exchange: Exchange, settings: ServerSettings, figures: HttpFigures
    ) -> None:
        self._answer, self._exchange, self._figures = answer, exchange, figures
        self.timeout_s = settings.limits.request_timeout_s
        self._logs_text = settings.log_prompts
        self._texts: list[str] = []
        self._last_s = 0.0
        self.cut: Cut | None = None

    @property
    def num_tokens(self) -> int:
        """Generated so far."""
        return self._answer.num_tokens

    @contextlib.asynccontextmanager
    async def watch(self, receive: Receive) -> AsyncIterator[None]:
        """Within, the answer is cut when the client leaves or time is up.

        After, nothing is left of it at the service.
        """
        loop = asyncio.get_running_loop()
        watcher = loop.create_task(self._wait_for_end(receive))
        timer = loop.call_later(self.timeout_s, self._answer.cut, "late")
        try:
            yield
        finally:
            timer.cancel()
            watcher.cancel()
            self._answer.drop()
            self._exchange.num_generated_tokens = self._answer.num_tokens
            self._exchange.finish_reason = self.cut or self._answer.finish_reason or "failed"
            if self._logs_text:
                self._exchange.texts["text"] = "".join(self._texts)

    async def read(self) -> Piece | None:
        """What the answer has grown by; None if the client has left.

        Raises: Refusal if time is up, or the service gave the request up.
        """
        piece = await self._answer.read()
        if piece is None:
            self.cut = self._answer.why_cut
            if self.cut == "late":
                said = f"not done within {self.timeout_s:g} s: ask for fewer tokens"
                raise Refusal(504, said, code="timeout")
            return None
        now_s = time.monotonic()
        if self._exchange.first_token_s is None:
            self._exchange.first_token_s = now_s - self._exchange.started_s
            self._figures.first_token.observe(self._exchange.first_token_s)
        else:
            self._figures.between_tokens.observe(now_s - self._last_s)
        self._last_s = now_s
        if self._logs_text:
            self._texts.append(piece.text)
        return piece

    async def _wait_for_end(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._answer.cut("gone")


class EventStream(Response):
    """Sends pieces as they come.

    Nothing is sent before the first is there, so that a request that fails until then is answered
    as any other.

    Args:
        reading: of the answer.
        form: what events look like.
        num_prompt_tokens: for the usage.
        tells_usage: whether the usage is sent.
    """

    def __init__(
        self, reading: Reading, form: Form, num_prompt_tokens: int, *, tells_usage: bool
    ) -> None:
        super().__init__(
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )
        del self.headers["content-length"]
        self._reading, self._form = reading, form
        self._num_prompt_tokens, self._tells_usage = num_prompt_tokens, tells_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer."""
        exchange = find_exchange(scope)
        async with self._reading.watch(receive):
            # A client that does not read holds up what is sent: that too has its time.
            async with asyncio.timeout(self._reading.timeout_s + _ERROR_S):
                try:
                    await self._send_all(send)
                except Refusal as refusal:
                    if exchange.status == 0:
                        raise
                    exchange.refused = refusal.name
                    await _send(send, write_error_event(refusal), more=False)

    async def _send_all(self, send: Send) -> None:
        form, begun = self._form, False
        while (piece := await self._reading.read()) is not None:
            data = b""
            if not begun:
                await self._begin(send)
                begun, data = True, form.write_opening()
            if piece.finish_reason is not None:
                usage = count_usage(self._num_prompt_tokens, self._reading.num_tokens)
                told = usage if self._tells_usage else None
                data += form.write_closing(piece.text, piece.finish_reason, told)
                await _send(send, data, more=False)
                return
            if piece.text:
                data += form.write_piece(piece.text)
            if data:
                await _send(send, data)

    async def _begin(self, send: Send) -> None:
        message = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(message)


async def _send(send: Send, data: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})
