"""`/v1/completions` and `/v1/chat/completions`: prompts in, text out, whole or as it comes."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from equipoise.elastic.service import ServiceRequest
from equipoise.engine.requests import SamplingParams
from equipoise.server.answers import Answer
from equipoise.server.backend import Backend
from equipoise.server.bodies import ChatBody, ChatCompletion, Completion, CompletionBody
from equipoise.server.exchange import Exchange, find_exchange
from equipoise.server.forms import ChatForm, CompletionForm, Form, Heading, count_usage
from equipoise.server.metrics import HttpFigures
from equipoise.server.reading import EventStream, Reading
from equipoise.server.refusals import Refusal, clean
from equipoise.server.settings import ServerSettings

DEFAULT_MAX_TOKENS = 16
"""Of a completion, as OpenAI has it; a chat may go on to the model's end."""


@dataclass(frozen=True)
class _Asked:
    """A prompt that was read, and how it is to be answered."""

    tokens: tuple[int, ...]
    sampling: SamplingParams
    form: Form
    streams: bool
    tells_usage: bool


class Completions:
    """The two endpoints.

    Args:
        backend: what they ask.
        settings: of the server.
        figures: what they count in.
    """

    def __init__(self, backend: Backend, settings: ServerSettings, figures: HttpFigures) -> None:
        self._backend, self._settings, self._figures = backend, settings, figures

    def add_routes(self, router: APIRouter) -> None:
        """Have a router call them."""
        router.add_api_route(
            "/v1/completions",
            self.complete,
            methods=["POST"],
            response_model=None,
            responses={200: {"model": Completion, "content": {"text/event-stream": {}}}},
        )
        router.add_api_route(
            "/v1/chat/completions",
            self.chat,
            methods=["POST"],
            response_model=None,
            responses={200: {"model": ChatCompletion, "content": {"text/event-stream": {}}}},
        )

    async def complete(self, body: CompletionBody, request: Request) -> Response:
        """Continue a prompt."""
        self._check(body.model)
        exchange = find_exchange(request.scope)
        prompt = body.prompt
        if isinstance(prompt, list) and not isinstance(prompt[0], int):
            prompt = prompt[0]
        if isinstance(prompt, str):
            tokens = await self._backend.texts.encode(_check_text(prompt, "prompt"))
        else:
            tokens = tuple(prompt)
        if self._settings.log_prompts:
            exchange.texts["prompt"] = prompt
        wanted = self._fit(tokens, body.max_tokens, DEFAULT_MAX_TOKENS, "prompt")
        heading = self._make_heading("cmpl", exchange, body)
        asked = _Asked(
            tokens,
            _read_sampling(body, wanted),
            CompletionForm(heading),
            bool(body.stream),
            heading.tells_usage,
        )
        return await self._answer(asked, exchange, request)

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """Say the assistant's next turn."""
        self._check(body.model)
        exchange = find_exchange(request.scope)
        if not self._backend.texts.can_chat:
            raise Refusal(
                400,
                f"the model {self._backend.model_name} has no chat template: use /v1/completions",
                code="no_chat_template",
            )
        for message in body.messages:
            for text in (
                [message.content]
                if isinstance(message.content, str)
                else [part.text for part in message.content]
            ):
                _check_text(text, "messages")
        tokens = await self._backend.texts.encode_chat(body.messages)
        if self._settings.log_prompts:
            exchange.texts["messages"] = [message.model_dump() for message in body.messages]
        asked_tokens = body.max_completion_tokens or body.max_tokens
        wanted = self._fit(tokens, asked_tokens, None, "messages")
        heading = self._make_heading("chatcmpl", exchange, body)
        asked = _Asked(
            tokens,
            _read_sampling(body, wanted),
            ChatForm(heading),
            bool(body.stream),
            heading.tells_usage,
        )
        return await self._answer(asked, exchange, request)

    def _check(self, model: str | None) -> None:
        self._backend.check_open()
        if model is not None and model != self._backend.model_name:
            raise Refusal(
                404,
                f"there is no model {clean(model)[:100]!r}: there is {self._backend.model_name!r}",
                code="model_not_found",
                param="model",
            )

    def _fit(
        self, tokens: tuple[int, ...], wanted: int | None, default: int | None, param: str
    ) -> int:
        """Tokens to generate, where they fit behind the prompt."""
        longest = self._backend.service.facts.max_len
        room = longest - len(tokens)
        if not tokens:
            raise Refusal(400, f"{param}: is empty; it needs at least one token", param=param)
        if room < 1:
            raise Refusal(
                400,
                f"{param}: has {len(tokens)} tokens; the model takes {longest}, generated ones "
                "included",
                code="context_length_exceeded",
                param=param,
            )
        if wanted is None:
            return room if default is None else min(default, room)
        if wanted > room:
            raise Refusal(
                400,
                f"max_tokens: {wanted} do not fit behind a prompt of {len(tokens)} tokens: the "
                f"model takes {longest}, so ask for at most {room}",
                code="context_length_exceeded",
                param="max_tokens",
            )
        return wanted

    def _make_heading(
        self, prefix: str, exchange: Exchange, body: CompletionBody | ChatBody
    ) -> Heading:
        options = body.stream_options
        return Heading(
            id=f"{prefix}-{exchange.id}",
            created=int(time.time()),
            model=self._backend.model_name,
            tells_usage=bool(options is not None and options.include_usage),
        )

    async def _answer(self, asked: _Asked, exchange: Exchange, request: Request) -> Response:
        num_prompt_tokens = exchange.num_prompt_tokens = len(asked.tokens)
        exchange.num_generated_tokens = 0
        answer = Answer(
            self._backend.service,
            self._backend.mailbox,
            ServiceRequest(exchange.id, asked.tokens, asked.sampling),
            self._backend.texts.stream(asked.sampling.stop),
        )
        reading = Reading(answer, exchange, self._settings, self._figures)
        answer.submit()
        if asked.streams:
            return EventStream(
                reading, asked.form, num_prompt_tokens, tells_usage=asked.tells_usage
            )
        text, finish_reason = "", ""
        async with reading.watch(request.receive):
            while not finish_reason and (piece := await reading.read()) is not None:
                text += piece.text
                finish_reason = piece.finish_reason or ""
        if not finish_reason:
            return Response(status_code=499)  # which nobody gets
        usage = count_usage(num_prompt_tokens, answer.num_tokens)
        return JSONResponse(asked.form.write_whole(text, finish_reason, usage))


def _check_text(text: str, param: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refusal(400, f"{param}: is not Unicode text", param=param) from error
    return text


def _read_sampling(body: CompletionBody | ChatBody, max_new_tokens: int) -> SamplingParams:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    # Below 2**64: tokens are drawn from it.
    seed = secrets.randbits(63) if body.seed is None else body.seed % (1 << 64)
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=seed,
        stop=tuple(_check_text(text, "stop") for text in stop),
        ignore_end=bool(body.ignore_eos),
    )
