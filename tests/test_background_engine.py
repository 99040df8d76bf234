"""What the engine says while balancing fails beside it: the plain model's tokens, up to the failure
and, where balancing is only given up, behind it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import pytest
import torch

from equipoise.balancer import EplbState
from equipoise.comm.base import EplbCommunicator, ExpertMoves
from equipoise.engine.engine import Engine, EngineLimits
from equipoise.engine.requests import Request
from equipoise.errors import EquipoiseError, MembershipError, TransferError
from equipoise.models.parallel import ParallelModel
from tests.ranks import Rank, processes
from tests.test_engine import draw_prompts, make_request, spread_model
from tests.test_models import make_model

FAMILY = "olmoe"
TIMEOUT_S = 10.0
"""Also to load a model in, beside whatever else a machine does."""
BEFORE = 3
"""Exchanges that go well before the one that breaks: experts have moved by then."""
BEHIND = 30
"""Steps that are served on where balancing is only given up."""
LONGEST_S = 120
"""Until the failure is known; some timeouts where nothing else runs."""
VICTIM = 1

Fault = Literal["exchange", "hang", "damage", "policy"]


class InjectedError(Exception):
    """What breaks here."""


def break_rank(parallel: ParallelModel, fault: Fault, released: threading.Event) -> None:
    """Have this rank's worker fail, a few chunks from now."""
    (wire,) = parallel.communicators
    count = _Countdown()
    if fault == "policy":
        _wrap(parallel.state.policy, "place", count, _raise)
    elif fault == "exchange":
        _wrap(wire, "finish", count, _raise)
    elif fault == "hang":
        _wrap(wire, "finish", count, lambda: released.wait(10 * TIMEOUT_S))
    else:
        _damage(wire, count)


class _Countdown:
    def __init__(self) -> None:
        self.left = BEFORE

    def is_over(self) -> bool:
        self.left -= 1
        return self.left < 0


def _wrap(owner: Any, name: str, count: _Countdown, fail: Callable[[], object]) -> None:
    call = getattr(owner, name)

    def broken(*arguments: object, **options: object) -> object:
        if count.is_over():
            fail()
        return call(*arguments, **options)

    # Frozen dataclasses are among them.
    object.__setattr__(owner, name, broken)


def _damage(wire: EplbCommunicator, count: _Countdown) -> None:
    """Turn a bit of what has arrived."""
    add_moves, finish = wire.add_moves, wire.finish
    into: list[torch.Tensor] = []

    def remember(moves: ExpertMoves) -> None:
        into[:] = [moves.into]
        add_moves(moves)

    def finish_and_damage() -> None:
        finish()
        if into[0].numel() and count.is_over():
            into[0][0] ^= 1

    wire.add_moves = remember  # type: ignore[method-assign]
    wire.finish = finish_and_damage  # type: ignore[method-assign]


def _raise() -> None:
    raise InjectedError("broken on purpose")


class Served:
    """What one rank has served.

    Attributes:
        requests: in the order in which they came.
        num_behind: steps since every rank knew of the failure.
        error: what a step raised, if any.
    """

    def __init__(self, engine: Engine, state: EplbState) -> None:
        self.requests: list[Request] = []
        self.num_behind = 0
        self.error: EquipoiseError | None = None
        deadline = time.monotonic() + LONGEST_S
        try:
            while self.num_behind < BEHIND:
                assert time.monotonic() < deadline, "nobody has heard of the failure"
                self._step(engine, state)
        except EquipoiseError as error:
            self.error = error

    def _step(self, engine: Engine, state: EplbState) -> None:
        if engine.num_requests < engine.limits.max_batch_size:
            number = len(self.requests)
            (prompt,) = draw_prompts([3 + (5 * number + state.group.rank) % 11])
            self.requests.append(make_request(number, prompt))
            engine.submit(self.requests[-1])
        engine.step()
        # The same on every rank: as long as one serves, dispatch needs all.
        is_known = torch.tensor([int(state.stats().failure is not None)])
        state.group.all_reduce(is_known, "min")
        self.num_behind += int(is_known)


def check_tokens(requests: list[Request]) -> int:
    """Each token is what the plain model chooses behind those before it; how many there are."""
    plain: Any = make_model(FAMILY)
    num_tokens = 0
    for request in requests:
        if request.generated:
            ids = torch.tensor([[*request.tokens, *request.generated[:-1]]])
            with torch.inference_mode():
                logits = plain(ids, use_cache=False, logits_to_keep=len(request.generated)).logits
            assert request.generated == logits[0].argmax(dim=1).tolist()
            num_tokens += len(request.generated)
    return num_tokens


@pytest.mark.parametrize("on_failure", ["raise", "disable"])
@pytest.mark.parametrize(
    "fault",
    [
        "exchange",
        "damage",
        pytest.param("hang", marks=pytest.mark.more_faults),
        pytest.param("policy", marks=pytest.mark.more_faults),
    ],
)
@pytest.mark.timeout(LONGEST_S + 240)
@processes(2, timeout_s=LONGEST_S + 80.0)
def test_tokens_are_the_plain_models_up_to_a_failure_and_behind_it(
    rank: Rank, fault: Fault, on_failure: Literal["raise", "disable"]
) -> None:
    parallel = spread_model(
        rank.make_group(timeout_s=TIMEOUT_S),
        FAMILY,
        step_interval=5,
        use_async=True,
        on_failure=on_failure,
        verify="all",
    )
    initial = parallel.spread.maps.placement
    released = threading.Event()
    if rank.rank == VICTIM:
        break_rank(parallel, fault, released)
    engine = Engine(parallel, EngineLimits(4, 40, prefill_chunk=8, end_tokens=frozenset()))
    served = Served(engine, parallel.state)
    released.set()
    assert check_tokens(served.requests) > 20
    stands = parallel.spread.maps.placement
    assert stands != initial, "nothing had moved before the failure"
    rank.store.set(f"stands/{rank.rank}", stands.fingerprint())
    rank.store.wait([f"stands/{1 - rank.rank}"], timedelta(seconds=40))
    assert rank.store.get(f"stands/{1 - rank.rank}").decode() == stands.fingerprint()
    if on_failure == "disable":
        assert served.error is None
        assert parallel.state.stats().failure is not None
    else:
        assert isinstance(served.error, TransferError | MembershipError)
        assert served.num_behind == 0
    parallel.close()
