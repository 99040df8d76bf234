"""The service and the tokenizer behind a server, from before they are there to their end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Literal, TypeVar

from equipoise.elastic.service import Service
from equipoise.engine.detokenizer import TextStream
from equipoise.job.texts import encode
from equipoise.models.loading import load_tokenizer
from equipoise.server.answers import Mailbox
from equipoise.server.bodies import Message
from equipoise.server.refusals import Refusal

State = Literal["starting", "serving", "draining"]
T = TypeVar("T")
NUM_REMEMBERED, LONGEST_REMEMBERED = 1 << 15, 4
"""Texts of a few tokens that are kept, and how few: some megabytes at most."""


class Decoder:
    """Decodes as a tokenizer does, and remembers.

    What comes token by token is decoded a few tokens at a time, often the same ones; some
    tokenizers, written in Python, take longer for it than everything else that a token costs here.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._remember = lru_cache(NUM_REMEMBERED)(self._decode)

    def decode(self, tokens: Sequence[int], **options: bool) -> str:
        """As the tokenizer's, for any options. Collective: none."""
        decode = self._remember if len(tokens) <= LONGEST_REMEMBERED else self._decode
        return decode(tuple(tokens), tuple(options.items()))

    def _decode(self, tokens: tuple[int, ...], options: tuple[tuple[str, bool], ...]) -> str:
        text: str = self._tokenizer.decode(list(tokens), **dict(options))
        return text


class Texts:
    """Makes tokens of text, and text of tokens.

    Args:
        tokenizer: of the model.
        thread: the one that encodes: tokenizers are not made for several at once.
    """

    def __init__(self, tokenizer: Any, thread: ThreadPoolExecutor) -> None:
        self._tokenizer, self._thread = tokenizer, thread
        self._decoder = Decoder(tokenizer)

    @property
    def can_chat(self) -> bool:
        """Whether there is a chat template."""
        return bool(getattr(self._tokenizer, "chat_template", None))

    async def encode(self, text: str) -> tuple[int, ...]:
        """Tokens of a prompt."""
        return await self._do(lambda: encode(self._tokenizer, text))

    async def encode_chat(self, messages: list[Message]) -> tuple[int, ...]:
        """Tokens of a chat that the assistant is to go on with.

        Raises: Refusal if the template does not take it.
        """
        turns = [
            {"role": message.role, "content": _join(message), **_name(message)}
            for message in messages
        ]

        def apply() -> tuple[int, ...]:
            text = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
            return tuple(
                self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            )

        try:
            return await self._do(apply)
        except Exception as error:  # templates raise what they like: they are programs
            said = str(error).partition("\n")[0][:200]
            raise Refusal(400, f"the chat template refuses it: {said}", param="messages") from error

    def stream(self, stop: tuple[str, ...]) -> TextStream:
        """Makes text of one request's tokens."""
        return TextStream(self._decoder, stop)

    async def _do(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


class Backend:
    """What endpoints work with. Owner: the event loop.

    Args:
        mailbox: of the loop.
        model_name: for clients; None for the service's.
    """

    def __init__(self, mailbox: Mailbox, model_name: str | None) -> None:
        self.mailbox = mailbox
        self.state: State = "starting"
        self.created = int(time.time())
        self._model_name = model_name
        self._service: Service | None = None
        self._texts: Texts | None = None
        self._thread = ThreadPoolExecutor(1, "encode")

    async def start(self, make_service: Callable[[], Service]) -> None:
        """Bring up what serves, in threads.

        Raises: whatever `make_service` raises; ModelError if there is no tokenizer.
        """
        service = await asyncio.to_thread(make_service)
        try:
            tokenizer = await asyncio.to_thread(load_tokenizer, service.facts.directory)
        except BaseException:
            await asyncio.to_thread(service.close)
            raise
        self._service, self._texts = service, Texts(tokenizer, self._thread)
        if self.state == "starting":
            self.state = "serving"

    @property
    def service(self) -> Service:
        """What serves.

        Raises: Refusal if it is not there yet.
        """
        if self._service is None:
            raise Refusal(503, "the model is being loaded", code="not_serving", retry_after_s=1)
        return self._service

    @property
    def texts(self) -> Texts:
        """As `service`."""
        if self._texts is None:
            raise Refusal(503, "the model is being loaded", code="not_serving", retry_after_s=1)
        return self._texts

    @property
    def model_name(self) -> str:
        """By which clients know the model."""
        return self._model_name or self.service.facts.name

    def check_open(self) -> None:
        """Take no new requests before and after its time.

        Raises: Refusal.
        """
        if self.state == "draining":
            raise Refusal(503, "the server is ending", code="not_serving", retry_after_s=5)
        _ = self.texts

    async def call(self, work: Callable[[Service], T]) -> T:
        """Have a thread ask the service something that may take a while.

        Raises: Refusal if it is not there yet; ServiceClosed if it is not any more.
        """
        return await asyncio.to_thread(work, self.service)

    async def end(self, drain_timeout_s: float) -> bool:
        """Take no more, wait for what is in flight, and close.

        Returns:
            Whether all of it ended by itself.
        """
        self.state = "draining"
        drained = True
        if self._service is not None:
            service = self._service
            drained = await asyncio.to_thread(service.drain, drain_timeout_s)
            await asyncio.to_thread(service.close)
        self._thread.shutdown(wait=False, cancel_futures=True)
        return drained


def _join(message: Message) -> str:
    if isinstance(message.content, str):
        return message.content
    return "".join(part.text for part in message.content)


def _name(message: Message) -> dict[str, str]:
    return {} if message.name is None else {"name": message.name}
