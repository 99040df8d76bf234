"""The commit agreement as a state machine whose parts are the real `Worker` and `Ledger`.

A state is an immutable value: per rank a worker W, a ledger, a forward thread F, what the halves
of the staging buffer hold, what was committed and when; and the words in the store. `enabled` names
what can happen next; whoever explores picks.

What the model leaves out, and why nothing is lost by it:

- What a worker does by itself follows at once: to offer, to come to an exchange, to begin staging
  once the half is free. Others see of it only that it has come, which they do not wait for to be
  absent, and a staging that begins at once is the longest that there can be. To hear an exchange
  is seen by nobody, so it is one with what follows: the offer, or the word put into the store.
- Ranks are alike, since every one of them proposes: states that differ by their order are one.
- F runs freely up to `last_step`, and beyond as long as something is offered or queued. All that
  is compared are differences of counts, so that later steps would be more of the same.
- Several models share a worker, which numbers their chunks in a row: they are more chunks.
- A poll that finds no order is an exchange from which nothing follows; one that finds some is a
  rebalance of one chunk that nobody stages and nothing is written for, during which F may begin
  another.

Time does not pass. A deadline is an action: one of `faults`, or free where something has broken.
Every action leaves its mark for good, so there are no cycles: if all states without a next action
are fit to rest in, every run comes to rest, whatever the order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from equipoise.balancer.protocol import ABORT, Answer, Do, Due, Ledger, Status, Worker

MOST_CHUNKS = 100


class Chunk(NamedTuple):
    rebalance: int
    number: int


def number(chunk: Chunk) -> int:
    """What the ledger calls it."""
    return chunk.rebalance * MOST_CHUNKS + chunk.number


def find_chunk(number: int) -> Chunk:
    return Chunk(*divmod(number, MOST_CHUNKS))


class Commit(NamedTuple):
    """`at` is None if F raised, and committed at once all that was decided."""

    chunk: Chunk
    at: int | None


class Meeting(NamedTuple):
    """The name of an exchange; they come in this order."""

    rebalance: int
    chunk: int
    do: int


class Rank(NamedTuple):
    worker: Worker
    ledger: Ledger
    halves: tuple[Chunk | None, ...]
    # Counts at which F asked for rebalances, and the one that W is at.
    started: tuple[int, ...] = (0,)
    rebalance: int = 0
    orders: frozenset[int] = frozenset()
    # What W brought to its last two exchanges; nobody can be further behind.
    brought: tuple[tuple[Meeting, int], ...] = ()
    is_staging: bool = False
    # Copies that F has given to its stream and that are not over.
    writing: tuple[Chunk, ...] = ()
    committed: tuple[Commit, ...] = ()
    # The word that F got in place of W, until it acts on it.
    answer: tuple[Chunk, str] | None = None
    is_waiting: bool = False
    has_given_up: bool = False
    has_raised: bool = False
    is_cut_off: bool = False
    is_hung: bool = False
    is_dead: bool = False

    @property
    def chunk(self) -> Chunk:
        return Chunk(self.rebalance, self.worker.chunk)

    @property
    def meeting(self) -> Meeting:
        return Meeting(self.rebalance, self.worker.chunk, self.worker.do.value)

    @property
    def served(self) -> int:
        """Steps that F is through with."""
        return self.ledger.steps - self.is_waiting

    @property
    def has_failed(self) -> bool:
        ended = self.worker.do is Do.END and self.worker.status is Status.FAILED
        return self.has_given_up or ended

    @property
    def is_broken(self) -> bool:
        return self.is_dead or self.is_hung or self.is_cut_off or self.has_raised

    def brought_to(self, meeting: Meeting) -> int | None:
        return next((word for name, word in self.brought if name == meeting), None)

    def has_committed(self, chunk: Chunk) -> bool:
        return any(one.chunk == chunk for one in self.committed)

    def has_staged(self, chunk: Chunk) -> bool:
        """Completely, so that this rank reads nothing of it from others any more."""
        if chunk.rebalance in self.orders:
            return True
        is_filling = self.is_staging and self.chunk == chunk
        return self.has_committed(chunk) or (chunk in self.halves and not is_filling)


Store = tuple[tuple[Chunk, str], ...]


class State(NamedTuple):
    """`is_alike`: nothing has happened yet that one rank may know and another not."""

    ranks: tuple[Rank, ...]
    store: Store = ()
    faults: int = 0
    is_alike: bool = True


class Action(NamedTuple):
    """What one rank does; what it then is follows from what it was alone: `effect(rank, argument)`.

    `store` is None if it is left as it is.
    """

    by: int
    name: str
    effect: Callable[[Rank, Any], Rank]
    argument: Any = None
    cost: int = 0
    is_alike: bool = True
    store: Store | None = None


@dataclass(frozen=True, kw_only=True)
class Model:
    """The rules. Those that threads keep, not the protocol, are methods, to be broken one by one.

    Attributes:
        chunks: of each rebalance.
        orders: rebalances that are polls which find an order; their one chunk moves nothing.
        triggers: counts at which another rebalance is to begin.
        last_step: up to which F runs freely.
        faults: how many may happen.
        raises: whether F raises after a failure; otherwise it goes on without balancing.
        one_per_step: whether a step has no room for a second chunk.
    """

    num_ranks: int = 2
    chunks: tuple[int, ...] = (2,)
    orders: frozenset[int] = frozenset()
    triggers: frozenset[int] = frozenset()
    last_step: int = 4
    faults: int = 0
    raises: bool = False
    margin: int = 1
    num_halves: int = 2
    one_per_step: bool = False
    make_worker: Callable[[int], Worker] = Worker
    make_ledger: Callable[[int], Ledger] = Ledger

    def start(self) -> State:
        halves = (None,) * self.num_halves
        worker, ledger = self.make_worker(self.margin), self.make_ledger(self.margin)
        rank = self._go_on(Rank(worker, ledger, halves, orders=self.orders))
        return State((rank,) * self.num_ranks, faults=self.faults)

    def enabled(self, state: State) -> Iterator[Action]:
        is_broken = any(rank.is_broken for rank in state.ranks)
        is_due = any(
            (rank.ledger.offer or rank.ledger.queue) and not (rank.is_dead or rank.has_raised)
            for rank in state.ranks
        )
        for index, me in enumerate(state.ranks):
            if me.is_dead:
                continue
            if me.writing:
                yield Action(index, "F's copies are over", self._write)
            if not me.has_raised:
                yield from self._forward(state, index, me, is_broken, is_due)
            if not (me.is_hung or me.worker.do is Do.END):
                yield from self._worker(state, index, me, is_broken)
            if state.faults:
                yield from self._faults(index, me)

    # What the threads see to.

    def is_free(self, me: Rank, half: int) -> bool:
        """W: whether the half may be filled."""
        return me.halves[half] is None

    def may_begin(self, me: Rank) -> bool:
        """W: whether all that F committed is in the slots, for others to read."""
        return not me.writing or me.rebalance in self.orders

    def is_over(self, me: Rank) -> bool:
        """F: whether the last rebalance is, by counts alone; it does not mind orders."""
        asked = [one for one in range(len(me.started)) if one not in self.orders]
        return not asked or me.has_committed(Chunk(asked[-1], self.chunks[asked[-1]] - 1))

    def sees_cut(self, me: Rank) -> bool:
        """F: whether this rank serves no more; known before W withdraws its offer."""
        return me.is_cut_off

    def find_earliest(self, me: Rank) -> int:
        """W: the least count at which there is room for the chunk at hand."""
        queued = [due.at for due in me.ledger.queue]
        taken = [*queued, *(one.at for one in me.committed if one.at is not None)]
        return max(taken) + 1 if self.one_per_step and taken else 0

    def may_leave(self, me: Rank) -> bool:
        """F: whether nothing is open any more that it would have to commit before it raises."""
        return me.ledger.offer is None and me.answer is None

    # The forward thread.

    def _forward(
        self, state: State, index: int, me: Rank, is_broken: bool, is_due: bool
    ) -> Iterator[Action]:
        ledger, is_cut = me.ledger, self.sees_cut(me)
        may_raise = is_cut or (self.raises and me.has_failed)
        # A peer that steps no more leaves the others in the midst of a forward pass.
        may_raise = may_raise or (is_broken and any(_is_gone(rank) for rank in state.ranks))
        if is_cut or (may_raise and not me.is_waiting and self.may_leave(me)):
            yield Action(index, "F raises", self._raise)
        if me.answer is not None:
            yield Action(index, "F acts on the store's word", self._act)
        if is_cut or me.answer is not None:
            return
        if ledger.offer is not None and (me.is_waiting or may_raise):
            yield from self._ask_store(state, index, me, 0 if is_broken else 1)
        if me.is_waiting:
            if not ledger.is_bound:
                yield Action(index, "F goes on", self._resume)
        elif (is_due or ledger.steps < self.last_step) and all(
            rank.served >= ledger.steps for rank in state.ranks
        ):
            yield Action(index, "F closes a step", self._close)

    def _ask_store(self, state: State, index: int, me: Rank, cost: int) -> Iterator[Action]:
        assert me.ledger.offer is not None
        chunk = find_chunk(me.ledger.offer.chunk)
        if cost <= state.faults:
            store, word = put(state.store, chunk, ABORT)
            yield Action(index, "F asks the store", self._ask, (chunk, word), cost, False, store)
        if state.faults:
            yield Action(index, "F asks a lost store", self._ask, None, 1, False)

    def _write(self, me: Rank, _: None) -> Rank:
        halves = tuple(None if half in me.writing else half for half in me.halves)
        return self._go_on(me._replace(halves=halves, writing=()))

    def _close(self, me: Rank, _: None) -> Rank:
        me = me._replace(ledger=me.ledger.close_step())
        return me._replace(is_waiting=True) if me.ledger.is_bound else self._take_due(me)

    def _resume(self, me: Rank, _: None) -> Rank:
        return self._take_due(me._replace(is_waiting=False))

    def _take_due(self, me: Rank) -> Rank:
        ledger, due = me.ledger.take_due()
        me = self._commit(me._replace(ledger=ledger), due)
        is_next = len(me.started) < len(self.chunks) and ledger.steps in self.triggers
        if is_next and self.is_over(me) and not me.has_failed:
            is_queued = len(me.started) - 1 in self.orders
            assert is_queued or me.worker.do is Do.END, "a worker is woken that has not ended"
            me = self._go_on(me._replace(started=(*me.started, ledger.steps)))
        return me

    def _ask(self, me: Rank, answer: tuple[Chunk, str] | None) -> Rank:
        is_cut_off = me.is_cut_off or answer is None
        return me._replace(answer=answer, has_given_up=True, is_cut_off=is_cut_off)

    def _act(self, me: Rank, _: None) -> Rank:
        assert me.answer is not None
        chunk, word = me.answer
        return me._replace(ledger=me.ledger.settle(number(chunk), word), answer=None)

    def _raise(self, me: Rank, _: None) -> Rank:
        ledger = replace(me.ledger, queue=())
        me = self._commit(me._replace(ledger=ledger), me.ledger.queue, is_late=True)
        return me._replace(has_raised=True, answer=None)

    def _commit(self, me: Rank, due: Sequence[Due], is_late: bool = False) -> Rank:
        for one in due:
            chunk = find_chunk(one.chunk)
            last = me.committed[-1].chunk if me.committed else Chunk(0, -1)
            follows = last._replace(number=last.number + 1)
            assert chunk in (follows, Chunk(last.rebalance + 1, 0)), "a chunk out of order"
            commit = Commit(chunk, None if is_late else one.at)
            me = me._replace(committed=(*me.committed, commit))
            if chunk.rebalance not in self.orders:
                assert chunk in me.halves, "a half was filled again"
                is_filling = me.is_staging and me.chunk == chunk
                assert not is_filling, "a half is still being filled"
                me = me._replace(writing=(*me.writing, chunk))
        return me

    # The worker.

    def _worker(self, state: State, index: int, me: Rank, is_broken: bool) -> Iterator[Action]:
        can_stop, stop_cost = me.has_raised or state.faults > 0, int(not me.has_raised)
        match me.worker.do:
            case Do.SETTLE:
                yield Action(index, "W settles", self._settle)
            case Do.STAGE:
                if me.is_staging:
                    yield Action(index, "W has staged", self._stage, Status.FINE)
                if can_stop:
                    yield Action(index, "W stops", self._stage, Status.STOPPED, stop_cost)
                # Where a peer is gone it fails too; to hear nothing at MEET comes to the same.
                if state.faults:
                    yield Action(index, "W fails to stage", self._stage, Status.FAILED, 1)
            case Do.START if me.brought_to(me.meeting) is None:
                if self.may_begin(me):
                    yield Action(index, "W begins", self._bring, Status.FINE)
                if can_stop:
                    yield Action(index, "W stops", self._bring, Status.STOPPED, stop_cost)
            case _:
                yield from self._meet(state, index, me, is_broken)

    def _meet(self, state: State, index: int, me: Rank, is_broken: bool) -> Iterator[Action]:
        meeting, do = me.meeting, me.worker.do
        words = tuple(rank.brought_to(meeting) for rank in state.ranks)
        is_hopeless = is_broken or any(
            word is None and _comes_no_more(me, rank)
            for word, rank in zip(words, state.ranks, strict=True)
        )
        if None not in words:
            answer: Any = words[0] if do is Do.PLAN else words
            yield from self._hear(state, index, me, f"W hears at {do.name}", answer, 0)
        if is_hopeless or state.faults:
            name, cost = f"W hears nothing at {do.name}", int(not is_hopeless)
            yield from self._hear(state, index, me, name, None, cost)

    def _hear(
        self, state: State, index: int, me: Rank, name: str, answer: Answer, cost: int
    ) -> Iterator[Action]:
        worker = me.worker.after(answer)
        if worker.do is not Do.DECIDE:
            yield Action(index, name, self._take, answer, cost, cost == 0)
            return
        store, word = put(state.store, me.chunk, worker.word)
        yield Action(
            index, f"{name}, decides", self._decide, (answer, word), cost, cost == 0, store
        )
        if cost < state.faults:
            lost = (answer, None)
            for how, after in (("before", state.store), ("after", store)):
                told = f"{name}, loses the store {how} its word"
                yield Action(index, told, self._decide, lost, cost + 1, False, after)

    def _bring(self, me: Rank, word: int) -> Rank:
        return me._replace(brought=(*me.brought[-1:], (me.meeting, word)))

    def _take(self, me: Rank, answer: Answer) -> Rank:
        return self._go_on(me._replace(worker=me.worker.after(answer)))

    def _stage(self, me: Rank, status: Status) -> Rank:
        return self._take(me._replace(is_staging=False), status)

    def _decide(self, me: Rank, told: tuple[Answer, str | None]) -> Rank:
        answer, word = told
        worker = me.worker.after(answer).after(word)
        return me._replace(worker=worker, is_cut_off=me.is_cut_off or word is None)

    def _settle(self, me: Rank, _: None) -> Rank:
        return self._take(
            me._replace(ledger=me.ledger.settle(number(me.chunk), me.worker.word)), None
        )

    def _go_on(self, me: Rank) -> Rank:
        """What W does by itself, as far as it gets."""
        if me.is_hung:
            return me
        is_asked = len(me.started) > me.rebalance + 1
        if is_asked and me.worker.do is Do.END and me.worker.status is Status.FINE:
            worker = self.make_worker(self.margin)
            me = me._replace(worker=worker, rebalance=me.rebalance + 1)
        if me.worker.do is Do.OFFER:
            ledger = me.ledger.make_offer(number(me.chunk))
            worker = replace(me.worker.after(ledger.steps), earliest=self.find_earliest(me))
            me = me._replace(ledger=ledger, worker=worker)
        if me.worker.do is Do.STAGE and me.rebalance in self.orders:
            me = me._replace(worker=me.worker.after(Status.FINE))
        elif me.worker.do is Do.STAGE and not me.is_staging:
            half = me.worker.chunk % self.num_halves
            if self.is_free(me, half) and not me.has_raised:
                halves = (*me.halves[:half], me.chunk, *me.halves[half + 1 :])
                me = me._replace(halves=halves, is_staging=True)
        if me.brought_to(me.meeting) is None:
            match me.worker.do:
                case Do.PLAN:
                    me = self._bring(me, self.chunks[me.rebalance])
                case Do.MEET:
                    me = self._bring(me, me.worker.status)
                case Do.COUNT:
                    assert me.ledger.offer is not None, "counts of what is not offered"
                    me = self._bring(me, me.ledger.offer.made_at)
        assert me.worker.do is not Do.END or me.ledger.offer is None, "an offer outlives its worker"
        return me

    # What goes wrong by itself.

    def _faults(self, index: int, me: Rank) -> Iterator[Action]:
        if not me.has_raised:
            yield Action(index, "dies", self._die, None, 1, False)
        if not (me.is_hung or me.worker.do is Do.END):
            yield Action(index, "W hangs", self._hang, None, 1, False)

    def _die(self, me: Rank, _: None) -> Rank:
        """What stays is what others have seen of it: what it served, and came to."""
        return Rank(
            worker=self.make_worker(self.margin),
            ledger=replace(self.make_ledger(self.margin), steps=me.served),
            halves=(),
            started=me.started,
            rebalance=me.rebalance,
            orders=me.orders,
            brought=me.brought,
            committed=me.committed,
            is_dead=True,
        )

    def _hang(self, me: Rank, _: None) -> Rank:
        return me._replace(is_hung=True)


def put(store: Store, chunk: Chunk, word: str) -> tuple[Store, str]:
    """The store afterwards, and the word that stands: the first."""
    standing = next((said for key, said in store if key == chunk), None)
    return (store, standing) if standing is not None else ((*store, (chunk, word)), word)


def _is_gone(rank: Rank) -> bool:
    return rank.is_dead or rank.has_raised


def _comes_no_more(me: Rank, rank: Rank) -> bool:
    """Whether a rank that did not come to my exchange never will."""
    if rank.is_dead or rank.is_hung:
        return True
    if rank.rebalance < me.rebalance:
        if len(rank.started) > me.rebalance:
            return rank.worker.do is Do.END
        # At that count it would have been asked.
        return rank.has_raised or rank.served >= me.started[me.rebalance]
    is_past = rank.meeting > me.meeting or rank.worker.do is Do.END
    return rank.rebalance > me.rebalance or is_past
