"""The application: endpoints, who may use them, and its description of itself."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException

from equipoise import __version__
from equipoise.elastic.service import ServiceClosed
from equipoise.server.backend import Backend
from equipoise.server.bodies import ErrorBody
from equipoise.server.completions import Completions
from equipoise.server.gate import Access, Gate
from equipoise.server.log import JsonLog
from equipoise.server.metrics import HttpFigures
from equipoise.server.operations import Operations
from equipoise.server.refusals import (
    answer_closed,
    answer_failure,
    answer_invalid,
    answer_refusal,
)
from equipoise.server.settings import ServerSettings

ACCESS = MappingProxyType(
    {
        "/health": Access.OPEN,
        "/health/live": Access.OPEN,
        "/health/ready": Access.OPEN,
        "/openapi.json": Access.API,
        "/v1/models": Access.API,
        "/v1/models/": Access.API,
        "/v1/completions": Access.API,
        "/v1/chat/completions": Access.API,
        "/metrics": Access.API,
        "/status": Access.API,
        "/placement": Access.API,
        "/is_scaling_elastic_ep": Access.API,
        "/scale_elastic_ep": Access.ADMIN,
        "/rebalance": Access.ADMIN,
    }
)
"""Every endpoint that there is."""

_STATUSES = {
    400: "What is asked for is wrong.",
    401: "No valid key.",
    403: "Another key is needed.",
    404: "There is no such model.",
    405: "Another method is needed.",
    408: "Time is up.",
    409: "The set of ranks cannot be changed so, or now.",
    413: "The body is too long.",
    429: "Too much waits: come again later.",
    500: "The server failed.",
    503: "Not served now.",
    504: "Not done in time.",
}


def make_app(
    backend: Backend, settings: ServerSettings, log: JsonLog, registry: CollectorRegistry
) -> Gate:
    """Put the application together.

    Args:
        backend: what it serves.
        settings: of the server.
        log: gets a line for each request.
        registry: gets the server's figures.
    Returns:
        The application, for an ASGI server.
    """
    app = FastAPI(
        title="Equipoise",
        version=__version__,
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={
            HTTPException: answer_refusal,
            RequestValidationError: answer_invalid,
            ServiceClosed: answer_closed,
            500: answer_failure,
        },
        responses={
            status: {"model": ErrorBody, "description": what} for status, what in _STATUSES.items()
        },
    )
    figures = HttpFigures(registry)
    router = APIRouter(redirect_slashes=False)
    Operations(backend, registry).add_routes(router)
    Completions(backend, settings, figures).add_routes(router)
    app.include_router(router)
    described = app.openapi

    def describe() -> dict[str, Any]:
        return _correct(described())

    app.openapi = describe  # type: ignore[method-assign]
    return Gate(app, ACCESS, settings, log, figures)


def _correct(document: dict[str, Any]) -> dict[str, Any]:
    """What is wrong with a body is said with 400 here, and in OpenAI's shape."""
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)
    return document
