"""What the worker hands to the forward thread: chunks, the steps that they are due at, its end."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equipoise.balancer.events import CpuGpuEvent
from equipoise.balancer.model_state import EplbModelState
from equipoise.balancer.orders import Order, OrderBox
from equipoise.balancer.outcome import RebalanceOutcome
from equipoise.balancer.protocol import ABORT, Ledger, Status
from equipoise.comm.span_copies import SpanCopies
from equipoise.dispatch.maps import PreparedMaps

MARGIN_STEPS = 2
"""Steps from the largest count at which a rank offers a chunk to its commit. The workers need two
exchanges in that time; if they need longer, forward threads wait for them."""

Arbiter = Callable[[str, str], str]
"""Settles (question, proposal) for the generation: what stands."""


@dataclass(frozen=True)
class AsyncEplbLayerResult:
    """Layers whose experts are staged on this rank. Made by the worker, used once by F.

    Attributes:
        model: theirs.
        maps: what the maps say of them from the commit on.
        copies: what fills the slots and switches the maps; the memory that they need.
        enqueue: does these copies, on the current stream.
        staging: the half that it is staged in, [bytes] uint8.
        freed: recorded once the half may be filled again.
    """

    model: EplbModelState
    maps: PreparedMaps
    copies: SpanCopies
    enqueue: Callable[[], None]
    staging: Tensor
    freed: CpuGpuEvent

    def commit(self) -> None:
        """F: fill the slots, switch the maps, and free the half, on the current stream.

        Somebody keeps this until the half is free.

        Collective: none; every rank at the same step.
        """
        # What lets go of the interpreter gets it back when the worker does: so, on a GPU, only the
        # launch and the record do.
        self.enqueue()
        self.model.adopt(self.maps)
        self.freed.record()

    def outlive_stream(self) -> None:
        """F: let go of this only behind what the current stream was given. Collective: none."""
        if self.staging.is_cuda:
            self.staging.record_stream(torch.cuda.current_stream(self.staging.device))
        self.copies.outlive_stream()
        self.maps.outlive_stream()


@dataclass(frozen=True)
class Chunk:
    """One chunk as it is offered.

    Attributes:
        question: the key that settles it.
        result: None for the chunk that ends a rebalance in which nothing moves.
        outcomes: of the models that are done with it; their steps are F's to name.
        is_last: of its rebalance.
        order: what F does beside, at the same step.
    """

    question: str
    result: AsyncEplbLayerResult | None
    outcomes: tuple[RebalanceOutcome, ...]
    is_last: bool
    order: Order = Order.NONE


@dataclass(frozen=True)
class End:
    """Why a worker works no more.

    Attributes:
        status: stopped, or failed.
        problem: what this rank knows of it, if it failed.
        cut_off: the store did not answer, so nobody knows what the others hold.
    """

    status: Status
    problem: Exception | None
    cut_off: bool = False


class Handover:
    """The ledger of one rank, and the chunks and the end that go with it.

    Shared by the forward thread and the worker. Everything is read and written under one lock,
    except the arbiter's answer, which is waited for outside.

    Args:
        arbiter: settles a chunk's question where the worker does not answer.
        timeout_s: longest that the forward thread waits for the worker.

    Attributes:
        orders: of this rank to all, which the worker takes to the others.
    """

    def __init__(self, arbiter: Arbiter, timeout_s: float) -> None:
        self.orders = OrderBox()
        self._changed = threading.Condition()
        self._ledger = Ledger(MARGIN_STEPS)
        self._chunks: dict[int, Chunk] = {}
        self._offered: Chunk | None = None
        # The chunk that W stages, until it is settled.
        self._entered: str | None = None
        # Kept until the device is through with their commits, or F has told it to keep them.
        self._lent: list[AsyncEplbLayerResult] = []
        self._end: End | None = None
        self._arbiter = arbiter
        self._timeout_s = timeout_s
        # What W is to end with, if not of itself.
        self._wanted = Status.FINE
        self._byte_s = 0.0
        self._measured: list[RebalanceOutcome] = []
        # When the worker's operation at hand is overdue; no worker, no time.
        self._overdue_at = math.inf

    def close_step(self) -> tuple[Chunk, ...]:
        """F: count a step, and take the chunks that are committed at it, in order.

        Collective: none; waits for this rank's worker where an offer could be due.
        Raises: MembershipError if neither the worker nor the store says what stands.
        """
        with self._changed:
            self._ledger = self._ledger.close_step()
            settled = self._changed.wait_for(lambda: not self._ledger.is_bound, self._timeout_s)
            if not settled:
                self._give_up(f"the worker did not answer within {self._timeout_s:.1f} s")
            elif time.monotonic() > self._overdue_at:
                # An exchange of its own has a deadline before this: it hangs elsewhere.
                self._give_up("the worker has not got on for longer than it may take")
        if not settled:
            self._ask()
        with self._changed:
            self._ledger, due = self._ledger.take_due()
            return tuple(self._chunks.pop(one.chunk) for one in due)

    def take_all(self) -> tuple[Chunk, ...]:
        """F, which will not step again: every chunk that is committed, due or not, in order.

        The worker may hang anywhere: what it would still have committed, nobody does.

        Collective: none.
        Raises: MembershipError if the store does not say whether a chunk on offer stands.
        """
        with self._changed:
            self._wanted = max(self._wanted, Status.STOPPED)
            entered = self._entered
        self._ask()
        if entered is not None:
            self._arbiter(entered, ABORT)
        with self._changed:
            left = tuple(self._chunks.pop(one.chunk) for one in self._ledger.queue)
            self._ledger = Ledger(MARGIN_STEPS, self._ledger.steps)
            return left

    def begin(self, seconds: float) -> None:
        """W: the next operation takes at most so many seconds; `math.inf` for rest."""
        with self._changed:
            self._overdue_at = time.monotonic() + seconds

    def enter(self, question: str) -> None:
        """W: the key of the chunk that comes next, told before it looks whether it may go on."""
        with self._changed:
            self._entered = question

    def offer(self, number: int, chunk: Chunk) -> int:
        """W: a chunk that every rank has staged.

        Args:
            number: of the chunk, never used before.
            chunk: what F will commit.
        Returns:
            F's count of steps.
        """
        with self._changed:
            self._ledger = self._ledger.make_offer(number)
            self._offered = chunk
            if chunk.result is not None:
                self._lent.append(chunk.result)
            if self._wanted is not Status.FINE:
                _cancel(chunk)
            return self._ledger.steps

    def settle(self, word: str) -> None:
        """W: the word that stands for the offered chunk, or for one that was not offered."""
        with self._changed:
            self._entered = None
            if self._ledger.offer is not None:
                self._settle(self._ledger.offer.chunk, word)

    def take_back(self, freed: AsyncEplbLayerResult | None = None) -> None:
        """W: the device is through with this commit, or with all that were made."""
        with self._changed:
            self._lent = [one for one in self._lent if freed is not None and one is not freed]

    def let_go(self) -> None:
        """F: W, which has ended, takes nothing back; the device keeps what it has to do with."""
        with self._changed:
            lent, self._lent = self._lent, []
        for one in lent:
            one.outlive_stream()

    def note_byte_s(self, byte_s: float) -> None:
        """W: seconds that a received byte took in the last rebalance that brought any."""
        with self._changed:
            self._byte_s = byte_s

    @property
    def byte_s(self) -> float:
        """Seconds that a received byte took; 0 before any came."""
        with self._changed:
            return self._byte_s

    def note_measured(self, outcomes: Sequence[RebalanceOutcome]) -> None:
        """W: outcomes that are complete now."""
        with self._changed:
            self._measured += outcomes

    def take_measured(self) -> list[RebalanceOutcome]:
        """F: outcomes that have become complete; each once."""
        with self._changed:
            measured, self._measured = self._measured, []
            return measured

    def end(self, end: End) -> None:
        """W: nothing more will come.

        The first reason stays, but for being cut off, which nothing may hide.
        """
        with self._changed:
            if self._end is None or (end.cut_off and not self._end.cut_off):
                self._end = end

    def stop(self) -> None:
        """F: nothing is committed any more; the worker shall give up what it is doing."""
        with self._changed:
            self._call_off(Status.STOPPED)

    def fail(self, end: End) -> None:
        """F: as `stop`, since it could not commit what the others commit."""
        with self._changed:
            self._call_off(Status.FAILED)
        self.end(end)

    def rest(self, seconds: float) -> Status:
        """W: let so much time pass, unless it shall give up; as `wanted`."""
        with self._changed:
            self._changed.wait_for(lambda: self._wanted is not Status.FINE, seconds)
            return self._wanted

    @property
    def wanted(self) -> Status:
        """W: what it is to end with; fine, while it may go on."""
        with self._changed:
            return self._wanted

    @property
    def ended(self) -> End | None:
        """Why nothing more will come, or None."""
        with self._changed:
            return self._end

    def _give_up(self, why: str) -> None:
        """The worker is not waited for any more; it stops at its next look."""
        self._wanted = Status.FAILED
        self._changed.notify_all()
        self._end = self._end or End(Status.FAILED, TimeoutError(why))

    def _call_off(self, status: Status) -> None:
        self._wanted = max(self._wanted, status)
        for chunk in (*self._chunks.values(), self._offered):
            _cancel(chunk)
        self._changed.notify_all()

    def _ask(self) -> None:
        """Settle a standing offer in the worker's place, by the word that stands for it."""
        with self._changed:
            asked, offer = self._offered, self._ledger.offer
        if asked is not None and offer is not None:
            # Not under the lock: the store may take its time.
            word = self._arbiter(asked.question, ABORT)
            with self._changed:
                self._settle(offer.chunk, word)

    def _settle(self, chunk: int, word: str) -> None:
        before, self._ledger = self._ledger, self._ledger.settle(chunk, word)
        if self._ledger is before:
            return
        if word != ABORT:
            assert self._offered is not None
            self._chunks[chunk] = self._offered
        self._offered = None
        self._changed.notify_all()


def _cancel(chunk: Chunk | None) -> None:
    """Let nobody wait for a half that will not be emptied."""
    if chunk is not None and chunk.result is not None:
        chunk.result.freed.cancel()
