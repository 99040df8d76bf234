"""From the service's threads to text, and the events around it."""

from __future__ import annotations

import asyncio
import functools
import json
import threading
from typing import Any

import pytest

from equipoise.bundled import model_directory
from equipoise.elastic.service import (
    Deliver,
    ModelFacts,
    QueueFull,
    RequestFailed,
    ServiceRequest,
)
from equipoise.engine.detokenizer import TextStream
from equipoise.engine.requests import Delta, SamplingParams
from equipoise.models.loading import load_tokenizer
from equipoise.server.answers import Answer, Mailbox
from equipoise.server.forms import ChatForm, CompletionForm, Heading, count_usage
from equipoise.server.refusals import Refusal

FACTS = ModelFacts("m", model_directory(), 64, 384, 4)
TEXT = "Fünf Käse und ein Satz; und noch einer"


class Scripted:
    """Says what the test has it say."""

    facts = FACTS

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.deliver: Deliver | None = None
        self.cancelled: list[str] = []

    def submit(self, request: ServiceRequest, deliver: Deliver) -> None:
        if self.error is not None:
            raise self.error
        self.deliver = deliver

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)


@functools.cache
def get_tokenizer() -> Any:
    return load_tokenizer(model_directory())


def make_answer(
    service: Any, loop: asyncio.AbstractEventLoop, stop: tuple[str, ...] = ()
) -> Answer:
    request = ServiceRequest("r", (5,), SamplingParams(stop=stop))
    return Answer(service, Mailbox(loop), request, TextStream(get_tokenizer(), stop))


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_pieces_are_the_text_however_tokens_come(size: int) -> None:
    tokens = get_tokenizer()(TEXT, add_special_tokens=False)["input_ids"]

    async def read() -> tuple[str, int]:
        service = Scripted()
        answer = make_answer(service, asyncio.get_running_loop())
        answer.submit()
        deliver = service.deliver
        assert deliver is not None

        def say() -> None:
            for at in range(0, len(tokens), size):
                part = tuple(tokens[at : at + size])
                last = at + size >= len(tokens)
                deliver(Delta("r", at, part, "length" if last else None))

        thread = threading.Thread(target=say)
        thread.start()
        text = ""
        while (piece := await answer.read()) is not None:
            text += piece.text
            if piece.finish_reason is not None:
                break
        thread.join()
        answer.drop()
        assert service.cancelled == []
        return text, answer.num_tokens

    assert asyncio.run(read()) == (TEXT, len(tokens))


def test_what_is_given_up_is_said_and_not_cancelled_again() -> None:
    async def read() -> None:
        service = Scripted()
        answer = make_answer(service, asyncio.get_running_loop())
        answer.submit()
        assert service.deliver is not None
        service.deliver(RequestFailed("r", "no rank is left"))
        with pytest.raises(Refusal, match="no rank is left") as caught:
            await answer.read()
        assert caught.value.status_code == 503
        answer.drop()
        assert service.cancelled == []

    asyncio.run(read())


def test_a_cut_answer_ends_and_is_cancelled() -> None:
    async def read() -> None:
        service = Scripted()
        answer = make_answer(service, asyncio.get_running_loop())
        answer.submit()
        asyncio.get_running_loop().call_soon(answer.cut, "gone")
        assert await answer.read() is None
        answer.cut("late")
        assert answer.why_cut == "gone"
        answer.drop()
        assert service.cancelled == ["r"]

    asyncio.run(read())


def test_a_full_queue_is_a_matter_of_time() -> None:
    async def submit() -> None:
        answer = make_answer(Scripted(QueueFull("9 wait")), asyncio.get_running_loop())
        with pytest.raises(Refusal) as caught:
            answer.submit()
        assert caught.value.status_code == 429
        assert caught.value.headers == {"retry-after": "1"}

    asyncio.run(submit())


def test_what_comes_behind_the_end_of_the_loop_hurts_nobody() -> None:
    loop = asyncio.new_event_loop()
    answer = make_answer(Scripted(), loop)
    mailbox = Mailbox(loop)
    loop.close()
    mailbox.put(answer, Delta("r", 0, (5,)))


@pytest.mark.parametrize("form_of", [CompletionForm, ChatForm])
@pytest.mark.parametrize("tells_usage", [False, True])
def test_events_are_whole_json_whatever_the_text(form_of: Any, tells_usage: bool) -> None:
    heading = Heading("id-1", 7, 'a "model" with "choices":[]', tells_usage)
    form = form_of(heading)
    text = 'quote " slash \\ newline \n null \0 "choices":[] ü \u2028'
    usage = count_usage(3, 4) if tells_usage else None
    stream = form.write_opening() + form.write_piece(text) + form.write_closing(text, "stop", usage)
    parts = stream.decode().removesuffix("\n\n").split("\n\n")
    assert parts.pop() == "data: [DONE]"
    events = [json.loads(part.removeprefix("data: ")) for part in parts]
    assert all((event["id"], event["model"]) == ("id-1", heading.model) for event in events)
    assert all(("usage" in event) == tells_usage for event in events)
    if tells_usage:
        assert events.pop()["usage"]["total_tokens"] == 7
    choices = [event["choices"][0] for event in events]
    said = [one["text"] if "text" in one else one["delta"].get("content", "") for one in choices]
    assert "".join(said) == text * 2
    assert [one["finish_reason"] for one in choices][-1] == "stop"
    assert {one["finish_reason"] for one in choices[:-1]} == {None}
