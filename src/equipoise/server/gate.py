"""What every request passes before an endpoint sees it: names, keys, limits, the log."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
import uuid
from collections.abc import Mapping
from enum import Enum

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from equipoise.server.exchange import Exchange
from equipoise.server.log import JsonLog
from equipoise.server.metrics import HttpFigures
from equipoise.server.refusals import Refusal, make_error
from equipoise.server.settings import Keys, ServerSettings, is_loopback

_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_LONGEST_PATH = 200
_DISCARDED, _DISCARD_S = 4, 2.0
"""Of a refused body so many times what would be taken is read, for so long."""


class Access(Enum):
    """Who may use an endpoint."""

    OPEN = "everybody"
    API = "who has the API key or the admin key"
    ADMIN = "who has the admin key"


class Gate:
    """The application around the application.

    An endpoint that stands in no table cannot be reached: a path that is not written exactly as
    there is not passed on, whatever a router would make of it.

    Args:
        app: what is behind it.
        access: by path; one that ends with a slash is of all that begin with it, two words deep.
        settings: of the server.
        log: gets a line for each request.
        figures: count them.
    """

    def __init__(
        self,
        app: ASGIApp,
        access: Mapping[str, Access],
        settings: ServerSettings,
        log: JsonLog,
        figures: HttpFigures,
    ) -> None:
        self._app, self._access, self._settings = app, access, settings
        self._log, self._figures = log, figures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request of HTTP."""
        if scope["type"] != "http":
            # Nothing here is done by websocket, and uvicorn is told to ask for no lifespan.
            raise RuntimeError(f"the server speaks HTTP only, not {scope['type']}")
        headers = Headers(scope=scope)
        exchange = _begin(scope, headers)

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"].append((b"x-request-id", exchange.id.encode()))
            elif not message.get("more_body", False):
                exchange.is_whole = True
            await send(message)

        endpoint = self._name(exchange.path)
        self._figures.in_flight.inc()
        limited = _LimitedBody(receive, headers, self._settings)
        try:
            self._check(scope, headers)
            limited.check_length()
            await self._app(scope, limited.receive, send_named)
        except Refusal as refusal:
            exchange.refused = refusal.name
            await _refuse(refusal, exchange, limited, send_named)
        except Exception as error:
            self._log.write_failure("failure", error, id=exchange.id)
            if exchange.is_whole:
                return
            if exchange.status != 0:
                raise  # the connection is closed, so that nobody takes half an answer for whole
            body = make_error(500, "the server failed; its log says how")
            await JSONResponse(body, 500)(scope, receive, send_named)
        finally:
            line = exchange.to_line()
            self._figures.in_flight.dec()
            self._figures.requests.labels(endpoint, str(exchange.status)).inc()
            self._figures.seconds.labels(endpoint).observe(line["seconds"])
            # Probes come every few seconds, and say nothing while all is well.
            is_probe = endpoint.startswith("/health") and exchange.status in (200, 503)
            if self._settings.log_health or not is_probe:
                self._log.write("request", **line)

    def _check(self, scope: Scope, headers: Headers) -> None:
        keys = self._settings.keys
        access = self._find(scope["path"])
        if keys is None:
            if access is not Access.OPEN:
                _check_local(headers)
        elif access is not Access.OPEN:
            _check_key(keys, access, headers)
        if access is None:
            raise Refusal(404, "there is nothing here: GET /openapi.json says what there is")

    def _find(self, path: str) -> Access | None:
        return self._access.get(self._name(path))

    def _name(self, path: str) -> str:
        """The entry of the table, whose last word may stand for any."""
        folder = path[: path.find("/", len("/v1/")) + 1]
        return path if path in self._access else folder if folder in self._access else "other"


class _LimitedBody:
    """A body that is neither too long nor too slow."""

    def __init__(self, receive: Receive, headers: Headers, settings: ServerSettings) -> None:
        self._receive, self._headers = receive, headers
        self._left_bytes = self._most_bytes = settings.limits.body_bytes
        self._timeout_s = settings.limits.body_timeout_s
        self._deadline_s = asyncio.get_running_loop().time() + self._timeout_s
        self._is_whole = False

    def check_length(self) -> None:
        """Refuse what says of itself that it is too long."""
        length = self._headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._most_bytes:
            raise self._too_long()

    async def receive(self) -> Message:
        """As the server's."""
        if self._is_whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline_s):
                message = await self._receive()
        except TimeoutError:
            raise Refusal(
                408, f"the body did not come within {self._timeout_s:g} s", code="timeout"
            ) from None
        if message["type"] == "http.request":
            self._left_bytes -= len(message.get("body", b""))
            if self._left_bytes < 0:
                raise self._too_long()
            self._is_whole = not message.get("more_body", False)
        return message

    async def discard(self) -> bool:
        """Read what is left and forget it, up to a point: who still sends reads no answer.

        Returns:
            Whether it was read to its end.
        """
        left_bytes = _DISCARDED * self._most_bytes
        try:
            async with asyncio.timeout(_DISCARD_S):
                while not self._is_whole and left_bytes > 0:
                    message = await self._receive()
                    if message["type"] != "http.request":
                        break
                    left_bytes -= len(message.get("body", b""))
                    self._is_whole = not message.get("more_body", False)
        except TimeoutError:
            pass
        return self._is_whole

    def _too_long(self) -> Refusal:
        return Refusal(
            413, f"the body is longer than {self._most_bytes} bytes", code="body_too_long"
        )


def _begin(scope: Scope, headers: Headers) -> Exchange:
    client = scope.get("client")
    exchange = Exchange(
        id=uuid.uuid4().hex,
        method=scope["method"],
        path=scope["path"][:_LONGEST_PATH],
        client=client[0] if client else "",
    )
    theirs = headers.get("x-request-id", "")
    if _ID.fullmatch(theirs):
        exchange.texts["client_request_id"] = theirs
    exchange.attach(scope)
    return exchange


def _check_key(keys: Keys, access: Access | None, headers: Headers) -> None:
    kind, _, shown = headers.get("authorization", "").partition(" ")
    given = shown.strip().encode("utf-8", "replace") if kind.lower() == "bearer" else b""
    # All of both are compared, so that the time it takes says nothing.
    is_admin = hmac.compare_digest(given, keys.admin.encode())
    is_user = hmac.compare_digest(given, keys.api.encode())
    if is_admin or (is_user and access is not Access.ADMIN):
        return
    if is_user:
        raise Refusal(
            403, "this changes the service: it takes the admin key", code="admin_key_needed"
        )
    raise Refusal(
        401,
        "no valid key: send Authorization: Bearer KEY"
        if given
        else "send Authorization: Bearer KEY",
        code="invalid_api_key",
    )


def _check_local(headers: Headers) -> None:
    """Without keys, a page in a browser of this machine must not get in on the user's behalf."""
    host = headers.get("host", "")
    if not is_loopback(_strip_port(host)):
        raise Refusal(403, "without keys it serves those who ask for localhost only")
    origin = headers.get("origin")
    if origin is not None and not is_loopback(_strip_port(origin.partition("://")[2])):
        raise Refusal(403, "without keys it serves no pages of other hosts")


def _strip_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    name = host.rpartition(":")[0] if host.count(":") == 1 else host
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name.lower()


async def _refuse(refusal: Refusal, exchange: Exchange, limited: _LimitedBody, send: Send) -> None:
    if exchange.status != 0:
        raise refusal  # behind half an answer there is nothing to say
    headers = dict(refusal.headers or {})
    if not await limited.discard():
        headers["connection"] = "close"
    response = JSONResponse(refusal.to_json(), refusal.status_code, headers=headers)
    await response({"type": "http"}, limited.receive, send)
