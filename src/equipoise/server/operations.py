"""What operators and their programs ask: is it there, how is it, and change it."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from equipoise.elastic.service import ServiceStatus
from equipoise.errors import ConfigError, MembershipError
from equipoise.server.backend import Backend
from equipoise.server.bodies import Done, Health, Model, ModelList, ScaleBody, Scaling
from equipoise.server.metrics import ServiceCollector
from equipoise.server.refusals import Refusal

NUM_CHANGERS = 4
"""Calls that change the service and wait for it, at once."""
_HEALTH: dict[int | str, dict[str, Any]] = {200: {"model": Health}, 503: {"model": Health}}


class Operations:
    """The endpoints beside the model's.

    Args:
        backend: what they ask and change.
        registry: of the server's own figures.
    """

    def __init__(self, backend: Backend, registry: CollectorRegistry) -> None:
        self._backend, self._registry = backend, registry
        registry.register(ServiceCollector(self._read_status))
        # Of their own: calls that wait for minutes must not keep threads from those that ask.
        self._threads = ThreadPoolExecutor(NUM_CHANGERS, "change")
        self._num_changes = 0

    def add_routes(self, router: APIRouter) -> None:
        """Have a router call them."""
        get, post = router.get, router.post
        for path in ("/health", "/health/ready"):
            get(path, response_model=None, responses=_HEALTH)(self.ready)
        get("/health/live", response_model=Health)(self.live)
        get("/v1/models", response_model=ModelList)(self.models)
        get("/v1/models/{name:path}", response_model=Model)(self.model)
        get("/metrics", response_model=None, responses={200: {"content": {"text/plain": {}}}})(
            self.metrics
        )
        get("/status", response_model=dict[str, Any])(self.status)
        get("/placement", response_model=dict[str, Any])(self.placement)
        post("/is_scaling_elastic_ep", response_model=Scaling)(self.is_scaling)
        post("/scale_elastic_ep", response_model=Done)(self.scale)
        post("/rebalance", response_model=Done)(self.rebalance)

    async def live(self) -> Health:
        """Whether the process answers: if not, start another."""
        return await self._examine()

    async def ready(self) -> Response:
        """Whether requests are served: if not, send them elsewhere."""
        health = await self._examine()
        return JSONResponse(health.model_dump(), 200 if health.ready else 503)

    async def models(self) -> ModelList:
        """The model."""
        return ModelList(object="list", data=[self._describe_model()])

    async def model(self, name: str) -> Model:
        """The model, by its name."""
        if name != self._backend.model_name:
            raise Refusal(
                404,
                f"there is no such model: there is {self._backend.model_name!r}",
                code="model_not_found",
            )
        return self._describe_model()

    async def metrics(self) -> Response:
        """Figures for Prometheus."""
        data = await asyncio.to_thread(generate_latest, self._registry)
        return Response(data, media_type=CONTENT_TYPE_LATEST)

    async def status(self) -> dict[str, Any]:
        """How the service is at this moment."""
        status = await self._backend.call(lambda service: service.status())
        data = status.to_json()
        data["model"]["name"] = self._backend.model_name
        return data

    async def placement(self) -> dict[str, Any]:
        """Which expert each slot holds."""
        return await self._backend.call(lambda service: service.placement())

    async def is_scaling(self) -> Scaling:
        """Whether the set of ranks is changing."""
        status = await self._backend.call(lambda service: service.status())
        changes = status.phase not in ("idle", "failed") or status.changes_waiting > 0
        return Scaling(is_scaling_elastic_ep=changes)

    async def scale(self, body: ScaleBody) -> Done:
        """Change the set of ranks; the answer comes when it is done."""
        if self._num_changes >= NUM_CHANGERS:
            raise Refusal(
                429, "as many changes wait as may", code="changes_waiting", retry_after_s=10
            )
        service = self._backend.service

        def change() -> dict[str, Any]:
            report = service.scale(
                body.new_data_parallel_size,
                tuple(body.remove or ()),
                dry_run=body.dry_run,
                timeout_s=float(body.drain_timeout),
            )
            return report.to_json()

        self._num_changes += 1
        try:
            loop = asyncio.get_running_loop()
            report = await loop.run_in_executor(self._threads, change)
        except TimeoutError as error:
            raise Refusal(
                408,
                f"not done after {body.drain_timeout} s; it goes on: POST /is_scaling_elastic_ep "
                "says whether it still does",
                code="timeout",
            ) from error
        except ConfigError as error:
            raise Refusal(400, str(error)) from error
        except MembershipError as error:
            raise Refusal(409, str(error), code="not_scaled") from error
        finally:
            self._num_changes -= 1
        size = len(report["joining"]) + len(report["staying"])
        would = "Would scale" if body.dry_run else "Scaled"
        return Done(message=f"{would} to {size} data parallel engines", report=report)

    async def rebalance(self) -> Done:
        """Have experts rebalanced."""
        try:
            await self._backend.call(lambda service: service.rebalance())
        except MembershipError as error:
            raise Refusal(409, str(error), code="not_rebalanced", retry_after_s=5) from error
        return Done(message="A rebalance begins at the next occasion")

    def _describe_model(self) -> Model:
        return Model(
            id=self._backend.model_name,
            object="model",
            created=self._backend.created,
            owned_by="equipoise",
            max_model_len=self._backend.service.facts.max_len,
        )

    async def _examine(self) -> Health:
        state = self._backend.state
        if state != "serving":
            reason = "the model is being loaded" if state == "starting" else "the server is ending"
            return Health(live=True, ready=False, reason=reason)
        status = await self._backend.call(lambda service: service.status())
        reason = "" if status.ready else status.reason or "no rank serves"
        return Health(live=True, ready=status.ready, reason=reason)

    def _read_status(self) -> ServiceStatus | None:
        return self._backend.service.status() if self._backend.state != "starting" else None
