"""A service of one rank in the caller's process, whose membership does not change."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]  # noqa: TID251

from equipoise.balancer import RebalanceOutcome
from equipoise.comm.groups import RankGroup, create_rank_group
from equipoise.elastic.requests import Delivery, RequestTable
from equipoise.elastic.service import (
    Busy,
    Deliver,
    ModelFacts,
    RankStatus,
    ScaleReport,
    ServiceClosed,
    ServiceRequest,
    ServiceStatus,
    ServiceTotals,
)
from equipoise.elastic.spec import ServiceSpec
from equipoise.engine.engine import Engine, EngineLimits
from equipoise.engine.requests import Request
from equipoise.errors import ConfigError, MembershipError
from equipoise.models.loading import load_tokenizer
from equipoise.models.parallel import ParallelModel, parallelize

NAME = "rank-0"
LOOK_S = 1.0
"""Longest that the forward thread waits for something to do without looking."""
END_S = 60.0
"""For the step that runs when it is closed."""


class OneRankService:
    """Serves requests by a forward thread of this process.

    Args:
        spec: of a service of one rank.
    Raises: ConfigError if it asks for more; ModelError if the model cannot be served.
    """

    def __init__(self, spec: ServiceSpec) -> None:
        if spec.num_ranks != 1:
            raise ConfigError(f"one process serves on one rank, not {spec.num_ranks}")
        self._spec = spec
        self._table = RequestTable(spec.queue_limit)
        self._changed = threading.Condition()
        self._cancelled: set[str] = set()
        self._wants_rebalance = self._is_ending = False
        self._is_draining = False
        self._reason = ""
        self._totals = ServiceTotals()
        self._balancedness: float | None = None
        self._group = _make_group(spec)
        try:
            self._parallel = parallelize(
                spec.model,
                self._group,
                spec.config,
                dtype=getattr(torch, spec.dtype),
                attention="sdpa",
            )
            self._engine = Engine(
                self._parallel,
                EngineLimits(spec.max_batch_size, spec.max_len),
                tokenizer=load_tokenizer(spec.model),
            )
        except BaseException:
            self._group.close()
            raise
        self._facts = _read_facts(spec, self._parallel)
        self._placement = _read_placement(self._parallel)
        self._thread = threading.Thread(target=self._serve, name="forward", daemon=True)
        self._thread.start()

    @property
    def facts(self) -> ModelFacts:
        """As `Service`."""
        return self._facts

    def submit(self, request: ServiceRequest, deliver: Deliver) -> None:
        """As `Service`."""
        self._check(request)
        with self._changed:
            if self._is_ending or self._is_draining:
                raise ServiceClosed(self._reason or "the service takes no more requests")
            self._table.add(request, deliver)
            self._changed.notify_all()

    def cancel(self, request_id: str) -> None:
        """As `Service`."""
        deliveries, holder = self._table.cancel(request_id)
        _make(deliveries)
        with self._changed:
            if holder is not None:
                self._cancelled.add(request_id)
            self._changed.notify_all()

    def status(self) -> ServiceStatus:
        """As `Service`."""
        with self._changed:
            serves = not self._is_ending
            running = self._table.held().get(NAME, 0)
            rank = RankStatus(
                name=NAME,
                number=0 if serves else None,
                pid=os.getpid(),
                host=socket.gethostname(),
                device=str(self._group.device),
                state="serving" if serves else "dead",
                steps=self._totals.steps,
                running=running,
                room=self._spec.max_batch_size - running,
                detail=self._reason,
            )
            return ServiceStatus(
                model=self._facts,
                generation=0,
                phase="failed" if self._reason else "idle",
                reason=self._reason,
                ready=serves and not self._is_draining,
                balancing=serves,
                balancedness=self._balancedness,
                ranks=(rank,),
                queue_length=self._table.num_waiting,
                queue_limit=self._spec.queue_limit,
                running=running,
                changes_waiting=0,
                totals=replace(self._totals, **self._table.counts()),
            )

    def placement(self) -> dict[str, Any]:
        """As `Service`."""
        with self._changed:
            if self._is_ending:
                raise ServiceClosed("no rank serves")
            return self._placement

    def scale(
        self,
        to: int | None = None,
        remove: Sequence[str] = (),
        *,
        dry_run: bool = False,
        busy: Busy = "queue",
        wait: bool = True,
        timeout_s: float = 600.0,
    ) -> ScaleReport:
        """As `Service`: there is one rank and stays one."""
        del busy, wait, timeout_s
        if (to is None) == (not remove):
            raise ConfigError("give the number of ranks, or names of ranks to remove")
        if to != 1:
            raise MembershipError("this service is one rank in the server's process: it stays one")
        return ScaleReport(dry_run, not dry_run, 0, joining=(), leaving=(), staying=(NAME,))

    def rebalance(self) -> None:
        """As `Service`."""
        with self._changed:
            if self._is_ending:
                raise ServiceClosed("no rank serves")
            self._wants_rebalance = True
            self._changed.notify_all()

    def drain(self, deadline_s: float) -> bool:
        """As `Service`."""
        with self._changed:
            self._is_draining = True
            return self._changed.wait_for(
                lambda: self._is_ending or not self._table.num_unfinished, deadline_s
            )

    def close(self) -> None:
        """As `Service`."""
        with self._changed:
            self._is_ending = True
            self._changed.notify_all()
        self._thread.join(END_S)

    def _check(self, request: ServiceRequest) -> None:
        longest, wanted = self._facts.max_len, request.sampling.max_new_tokens
        if not request.tokens:
            raise ConfigError("the prompt is empty: it needs at least one token")
        if len(request.tokens) + wanted > longest:
            raise ConfigError(
                f"{len(request.tokens)} tokens and {wanted} new ones: the model takes {longest}"
            )
        if not 0 <= min(request.tokens) <= max(request.tokens) < self._facts.vocabulary_size:
            raise ConfigError(f"tokens must be from 0 to {self._facts.vocabulary_size - 1}")

    def _serve(self) -> None:
        """The forward thread."""
        reason = "the service was closed"
        try:
            if self._group.device.type == "cpu":
                torch.set_num_threads(1)
            while self._take_orders():
                self._step()
        except Exception as error:
            self._reason = reason = f"serving failed: {type(error).__name__}: {error}"
            raise
        finally:
            with self._changed:
                self._is_ending = True
            _make(self._table.fail(reason))
            with self._changed:
                self._changed.notify_all()
            self._parallel.close()
            self._group.close()

    def _take_orders(self) -> bool:
        """Wait until there is something to do; False where that is to end."""
        engine, state = self._engine, self._parallel.state
        with self._changed:
            while not (self._is_ending or engine.has_work or self._wants_rebalance):
                if self._table.num_waiting or state.is_rebalancing:
                    break
                self._changed.wait(LOOK_S)
            cancelled, self._cancelled = self._cancelled, set()
            if self._wants_rebalance:
                self._wants_rebalance = False
                self._note(state.rearrange())
            is_ending = self._is_ending
        for given in self._table.assign({NAME: self._spec.max_batch_size}):
            request = given.request
            self._engine.submit(Request(request.id, request.tokens, request.sampling))
        for request_id in cancelled:
            engine.cancel(request_id)
        return not is_ending

    def _step(self) -> None:
        result = self._engine.step() if self._engine.has_work else self._engine.tick()
        for delta in result.deltas:
            _make(self._table.take(NAME, 1, delta))
        with self._changed:
            self._note(result.outcomes)
            self._totals = replace(self._totals, steps=self._totals.steps + 1)
            self._changed.notify_all()

    def _note(self, outcomes: tuple[RebalanceOutcome, ...]) -> None:
        """Rebalances have ended, with a step or between two."""
        if outcomes:
            self._balancedness = float(outcomes[-1].balancedness_after.mean())
            self._placement = _read_placement(self._parallel)
            num_rebalances = self._totals.rebalances + len(outcomes)
            self._totals = replace(self._totals, rebalances=num_rebalances)


def _make(deliveries: Sequence[Delivery]) -> None:
    for deliver, item in deliveries:
        deliver(item)


def _make_group(spec: ServiceSpec) -> RankGroup:
    device = torch.device("cuda:0" if spec.device == "cuda" else "cpu")
    timeout = timedelta(seconds=spec.timeout_s)
    return create_rank_group(HashStore(), 0, 1, device, timeout=timeout, device_group="gloo")


def _read_facts(spec: ServiceSpec, parallel: ParallelModel) -> ModelFacts:
    return ModelFacts(
        name=spec.model.name,
        directory=spec.model,
        max_len=spec.max_len,
        vocabulary_size=int(parallel.model.config.vocab_size),
        max_batch_size=spec.max_batch_size,
    )


def _read_placement(parallel: ParallelModel) -> dict[str, Any]:
    placements = [json.loads(one.maps.placement.to_json()) for one in parallel.spread.sets]
    first: dict[str, Any] = placements[0]
    return first if len(placements) == 1 else {"sets": placements}
