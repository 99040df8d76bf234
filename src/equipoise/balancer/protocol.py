"""How ranks settle the step at which all of them commit a chunk, as values.

Each rank has a forward thread F, which steps, and a worker W, which plans and stages. Only the W
of different ranks talk to each other. What F and W of one rank share is a `Ledger`, changed under
one lock; what W does next is a `Worker`. Both are immutable and know nothing of threads, wires or
clocks: whoever holds them performs the operations, and a checker can explore every order of them.

A chunk is bound to a step only after every rank has staged it: W hears everybody's status, offers
the chunk at its own count of steps, and the step is the largest count offered plus a margin. F
may not pass its own offered count plus the margin before the answer is there, so it cannot miss
the step; and as it waits for workers that have staged already, none of which waits for any F, it
cannot wait for ever. The store settles what the ranks cannot settle among themselves: the first
word under a chunk's key stands, for those too that have lost sight of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum, IntEnum, auto
from typing import NamedTuple

ABORT = "abort"


class Status(IntEnum):
    """How a rank fares; the largest of all ranks' counts."""

    FINE = 0
    STOPPED = 1
    FAILED = 2


class Do(Enum):
    """What a worker does next, and the answer that it gets for it.

    START: wait until F's last commit is over, then exchange statuses. Statuses by rank, or None
        if they cannot be heard.
    PLAN: sum the loads, plan, compare. The number of chunks, at least one, or None if that failed.
    STAGE: wait until F has emptied the half, fill it. A status.
    MEET: exchange statuses; as START.
    OFFER: put the offer into the ledger. F's count of steps.
    COUNT: exchange these. Counts by rank, or None.
    DECIDE: put the word that was proposed under the chunk's key. The word that stands, or None if
        the store does not answer.
    SETTLE: withdraw the offer, and queue the chunk if it is committed. None.
    END: nothing.
    """

    START = auto()
    PLAN = auto()
    STAGE = auto()
    MEET = auto()
    OFFER = auto()
    COUNT = auto()
    DECIDE = auto()
    SETTLE = auto()
    END = auto()


Answer = Sequence[int] | int | str | None


@dataclass(frozen=True)
class Worker:
    """Where the worker of one rank stands in a rebalance.

    Attributes:
        margin: steps between the largest count offered and the commit, at least 1.
        do: what comes next.
        chunk: the one at hand.
        num_chunks: of the rebalance, once planned.
        status: of this rank, or, at the end, what it came to.
        word: proposed under the chunk's key, then the one that stands.
        earliest: count before which the chunk is not committed, as the steps before have enough to
            do; the same on every rank.
    """

    margin: int
    do: Do = Do.START
    chunk: int = 0
    num_chunks: int = 0
    status: Status = Status.FINE
    word: str = ABORT
    earliest: int = 0

    def after(self, answer: Answer) -> Worker:
        """The worker once what it had to do is done.

        Args:
            answer: as `Do` says.
        """
        match self.do:
            case Do.START:
                worst = _worst(answer)
                return self._go(Do.PLAN) if worst is Status.FINE else self._end(worst)
            case Do.PLAN:
                if answer is None:
                    return self._end(Status.FAILED)
                assert isinstance(answer, int)
                return replace(self, do=Do.STAGE, num_chunks=answer)
            case Do.STAGE:
                assert isinstance(answer, int)
                return replace(self, do=Do.MEET, status=Status(answer))
            case Do.MEET:
                worst = _worst(answer)
                if worst is Status.FINE:
                    return self._go(Do.OFFER)
                return replace(self, do=Do.DECIDE, status=worst, word=ABORT)
            case Do.OFFER:
                return self._go(Do.COUNT)
            case Do.COUNT:
                return self._propose(answer)
            case Do.DECIDE:
                return self._take(answer)
            case Do.SETTLE:
                if self.word == ABORT:
                    return self._go(Do.END)
                return self._next_chunk()
            case Do.END:
                raise AssertionError("a rebalance that has ended goes nowhere")

    def _propose(self, counts: Answer) -> Worker:
        if counts is None:
            return replace(self, do=Do.DECIDE, status=Status.FAILED, word=ABORT)
        assert isinstance(counts, Sequence)
        at = max(int(count) for count in counts) + self.margin
        return replace(self, do=Do.DECIDE, word=say_commit(max(at, self.earliest)))

    def _take(self, word: Answer) -> Worker:
        if word is None:
            return replace(self, do=Do.SETTLE, status=Status.FAILED, word=ABORT)
        assert isinstance(word, str)
        fares = self.status
        if word == ABORT and fares is Status.FINE:
            fares = Status.FAILED
        return replace(self, do=Do.SETTLE, status=fares, word=word)

    def _next_chunk(self) -> Worker:
        # The chunk stands, but a rank that could not hear the others can meet them no more.
        if self.status is not Status.FINE or self.chunk + 1 == self.num_chunks:
            return self._go(Do.END)
        return replace(self, do=Do.STAGE, chunk=self.chunk + 1)

    def _go(self, do: Do) -> Worker:
        return replace(self, do=do)

    def _end(self, status: Status) -> Worker:
        return replace(self, do=Do.END, status=status)


class Offer(NamedTuple):
    """A chunk that all ranks have staged, and F's steps when it was offered."""

    chunk: int
    made_at: int


class Due(NamedTuple):
    """A chunk, and the count of steps at which it is committed."""

    chunk: int
    at: int


@dataclass(frozen=True)
class Ledger:
    """What F and W of one rank share.

    Attributes:
        margin: as in `Worker`.
        steps: that F has closed.
        offer: stands from OFFER to SETTLE.
        queue: chunks decided and not committed yet, in the order in which they were decided.
    """

    margin: int
    steps: int = 0
    offer: Offer | None = None
    queue: tuple[Due, ...] = ()

    @property
    def is_bound(self) -> bool:
        """Whether F must wait: it has reached the least step that the offer may be due at."""
        return self.offer is not None and self.steps >= self.offer.made_at + self.margin

    def close_step(self) -> Ledger:
        """F: one step more. Not while bound."""
        assert not self.is_bound, "the step before was not waited for"
        return replace(self, steps=self.steps + 1)

    def take_due(self) -> tuple[Ledger, tuple[Due, ...]]:
        """F, not bound: the chunks to be committed at this step, in order."""
        assert not self.is_bound, "what is due is not known yet"
        due = tuple(one for one in self.queue if one.at <= self.steps)
        assert all(one.at == self.steps for one in due), "a commit was missed"
        return replace(self, queue=self.queue[len(due) :]), due

    def make_offer(self, chunk: int) -> Ledger:
        """W: offer a chunk at F's count."""
        assert self.offer is None, "one offer at a time"
        return replace(self, offer=Offer(chunk, self.steps))

    def settle(self, chunk: int, word: str) -> Ledger:
        """W, or F in its place: withdraw the offer of a chunk, by the word that stands for it.

        Nothing changes if it is not offered, or not any more: while F asks the store in its
        worker's place, the worker may settle this chunk and offer the next.
        """
        if self.offer is None or self.offer.chunk != chunk:
            return self
        at = read_commit(word)
        queue = self.queue if at is None else (*self.queue, Due(chunk, at))
        return replace(self, offer=None, queue=queue)


def say_commit(at: int) -> str:
    """The word that commits a chunk at a count of steps."""
    return f"commit at {at}"


def read_commit(word: str) -> int | None:
    """The count of steps that a word commits at; None if it aborts."""
    return None if word == ABORT else int(word.removeprefix("commit at "))


def _worst(statuses: Answer) -> Status:
    if statuses is None:
        return Status.FAILED
    assert isinstance(statuses, Sequence)
    return Status(max(int(status) for status in statuses))
