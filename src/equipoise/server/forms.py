"""How completions and chats are written, whole and as events."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Protocol

LAST_EVENT = b"data: [DONE]\n\n"


class Form(Protocol):
    """The fields around a text."""

    def write_whole(self, text: str, finish_reason: str, usage: dict[str, int]) -> dict[str, Any]:
        """The whole answer."""

    def write_opening(self) -> bytes:
        """Events before the first piece; may be none."""

    def write_piece(self, text: str) -> bytes:
        """An event with a piece of text."""

    def write_closing(self, text: str, finish_reason: str, usage: dict[str, int] | None) -> bytes:
        """Events with the last piece, why it ended, and the usage if it is not None."""


@dataclass(frozen=True)
class Heading:
    """What all events of an answer say alike.

    Attributes:
        id: of the answer.
        created: seconds since 1970.
        model: its name.
        tells_usage: whether events have a field for it.
    """

    id: str
    created: int
    model: str
    tells_usage: bool = False


def count_usage(num_prompt: int, num_generated: int) -> dict[str, int]:
    """The usage field."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
    }


class CompletionForm:
    """Of `/v1/completions`."""

    def __init__(self, heading: Heading) -> None:
        self._heading = heading
        before, after = _write_frame(heading, "text_completion")
        # Most of the bytes of an event are the same in all: they are written once.
        self._before = before + '{"index":0,"text":'
        self._after = ',"logprobs":null,"finish_reason":null}' + after

    def write_whole(self, text: str, finish_reason: str, usage: dict[str, int]) -> dict[str, Any]:
        """As `Form`."""
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
        return _write_whole(self._heading, "text_completion", choice, usage)

    def write_opening(self) -> bytes:
        """As `Form`."""
        return b""

    def write_piece(self, text: str) -> bytes:
        """As `Form`."""
        return (self._before + json.dumps(text) + self._after).encode()

    def write_closing(self, text: str, finish_reason: str, usage: dict[str, int] | None) -> bytes:
        """As `Form`."""
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
        return _write_closing(self._heading, "text_completion", [choice], usage)


class ChatForm:
    """Of `/v1/chat/completions`."""

    def __init__(self, heading: Heading) -> None:
        self._heading = heading
        before, after = _write_frame(heading, "chat.completion.chunk")
        self._before = before + '{"index":0,"delta":{"content":'
        self._after = '},"logprobs":null,"finish_reason":null}' + after

    def write_whole(self, text: str, finish_reason: str, usage: dict[str, int]) -> dict[str, Any]:
        """As `Form`."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "logprobs": None,
            "finish_reason": finish_reason,
        }
        return _write_whole(self._heading, "chat.completion", choice, usage)

    def write_opening(self) -> bytes:
        """As `Form`."""
        choice = _write_delta({"role": "assistant", "content": ""}, None)
        return _write_event(self._heading, "chat.completion.chunk", [choice])

    def write_piece(self, text: str) -> bytes:
        """As `Form`."""
        return (self._before + json.dumps(text) + self._after).encode()

    def write_closing(self, text: str, finish_reason: str, usage: dict[str, int] | None) -> bytes:
        """As `Form`."""
        choice = _write_delta({"content": text} if text else {}, finish_reason)
        return _write_closing(self._heading, "chat.completion.chunk", [choice], usage)


def _write_delta(delta: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _write_whole(
    heading: Heading, kind: str, choice: dict[str, Any], usage: dict[str, int]
) -> dict[str, Any]:
    return {
        "id": heading.id,
        "object": kind,
        "created": heading.created,
        "model": heading.model,
        "choices": [choice],
        "usage": usage,
    }


def _write_event(
    heading: Heading, kind: str, choices: list[dict[str, Any]], usage: dict[str, int] | None = None
) -> bytes:
    event = {
        "id": heading.id,
        "object": kind,
        "created": heading.created,
        "model": heading.model,
        "choices": choices,
    }
    if heading.tells_usage:
        event["usage"] = usage
    return b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"


def _write_closing(
    heading: Heading, kind: str, choices: list[dict[str, Any]], usage: dict[str, int] | None
) -> bytes:
    events = _write_event(heading, kind, choices)
    if usage is not None:
        events += _write_event(heading, kind, [], usage)
    return events + LAST_EVENT


def _write_frame(heading: Heading, kind: str) -> tuple[str, str]:
    """An event of one choice without the choice: what is before it and behind it."""
    whole = _write_event(heading, kind, []).decode()
    before, after = whole.rsplit('"choices":[]', 1)
    return before + '"choices":[', "]" + after
