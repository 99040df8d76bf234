"""Answers that say no, in the shape that OpenAI's clients read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request

from equipoise.server.exchange import find_exchange

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_FORMS = frozenset({"str", "constrained-str"})
"""How places of errors name the first form of a field that has several."""
_INVALID = "invalid_request_error"
_LONGEST_WORD = 100


class Refusal(HTTPException):
    """A request that gets no for an answer.

    Args:
        status: of HTTP.
        message: what is wrong and what would be right.
        code: for programs, as OpenAI writes them; None where it has none.
        param: the field that is wrong, if one is.
        retry_after_s: when it may be tried again; None says nothing about that.
        headers: that the answer shall have besides.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        more = {} if retry_after_s is None else {"retry-after": str(retry_after_s)}
        if status == 401:
            more["www-authenticate"] = "Bearer"
        super().__init__(status, message, {**(headers or {}), **more})
        self.code, self.param = code, param

    @property
    def name(self) -> str:
        """For the log: never what a client said."""
        if self.status_code >= 500:
            return str(self.detail)
        return self.code or _TYPES.get(self.status_code, _INVALID)

    def to_json(self) -> dict[str, Any]:
        """The body of the answer."""
        return make_error(self.status_code, str(self.detail), self.code, self.param)


def make_error(
    status: int, message: str, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """The body of an answer that says no."""
    return {
        "error": {
            "message": clean(message),
            "type": _TYPES.get(status, _INVALID),
            "param": None if param is None else clean(param),
            "code": code,
        }
    }


def clean(text: str) -> str:
    """A text that can be written as UTF-8: clients send halves of surrogate pairs too."""
    return text.encode("utf-8", "replace").decode("utf-8")


async def answer_refusal(request: Request, error: Exception) -> JSONResponse:
    """Of what an endpoint, or the router, refused."""
    assert isinstance(error, HTTPException)
    if not isinstance(error, Refusal):
        error = Refusal(error.status_code, str(error.detail), headers=error.headers)
    find_exchange(request.scope).refused = error.name
    return JSONResponse(error.to_json(), error.status_code, headers=error.headers)


async def answer_closed(request: Request, error: Exception) -> JSONResponse:
    """Of a service that takes no more, whatever it was asked."""
    return await answer_refusal(
        request, Refusal(503, str(error), code="not_serving", retry_after_s=5)
    )


async def answer_invalid(request: Request, error: Exception) -> JSONResponse:
    """Of a body that is not what the endpoint takes: the first thing that is wrong with it."""
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    first = errors[0]
    find_exchange(request.scope).refused = _INVALID
    # What stands at the front is "body"; numbers are places in lists, or in broken JSON.
    place = [str(part)[:_LONGEST_WORD] for part in first["loc"][1:]]
    rivals = [each for each in errors if each["loc"][:2] == first["loc"][:2]]
    if len(rivals) > 1 and len(place) > 1 and first["loc"][2] in _FORMS:
        # A field of several forms: there is a complaint of each.
        place = place[:1]
        first = {**first, "msg": ", or ".join(dict.fromkeys(map(_say, rivals)))}
    message, param = _describe(first, place), ".".join(place) or None
    if first["type"] == "json_invalid":
        param = None
    return JSONResponse(make_error(400, message, param=param), 400)


async def answer_failure(_request: Request, _error: Exception) -> JSONResponse:
    """Of an endpoint that failed; the log says how."""
    return JSONResponse(make_error(500, "the server failed; its log says how"), 500)


def _describe(error: Mapping[str, Any], place: Sequence[str]) -> str:
    message = _say(error)
    if error["type"] == "json_invalid":
        reason = (error.get("ctx") or {}).get("error", "it ends too early")
        return f"the body is not JSON: {reason}"
    if not place and error["type"] == "model_attributes_type":
        return "the body: is no JSON object, or not said to be: content-type: application/json"
    if error["type"] == "extra_forbidden":
        return f"{'.'.join(place)}: this server knows no such field"
    return f"{'.'.join(place) or 'the body'}: {message.removeprefix('value error, ')}"


def _say(error: Mapping[str, Any]) -> str:
    message = str(error["msg"])
    if error["type"] in ("literal_error", "none_required"):
        message += ", or left out"
    return message[:1].lower() + message[1:]


def write_error_event(refusal: Refusal) -> bytes:
    """A refusal in a stream of events that has begun."""
    return b"data: " + json.dumps(refusal.to_json(), separators=(",", ":")).encode() + b"\n\n"
