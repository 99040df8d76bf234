"""Explores the commit agreement: every order of what may happen, or some at random."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from equipoise.balancer.protocol import Do, Status
from tests.commit_model import Action, Chunk, Model, Rank, State, Store, find_chunk


class ViolationError(AssertionError):
    """What does not hold, and the shortest way to it that was found."""


class Explored(NamedTuple):
    """How much was seen: states, actions from them, and states in which nothing is left to do."""

    num_states: int
    num_actions: int
    num_rests: int


# Ranks by number, sorted: their order says nothing.
Key = tuple[tuple[int, ...], Store, int, bool]


@dataclass
class _Book:
    """Ranks by number, in the order in which they are met, and what was found out about them.

    Of the many states, most are made of ranks that were met before: what an action makes of a rank,
    and what holds between two ranks, is worked out once.
    """

    ranks: list[Rank] = field(default_factory=list)
    number_of: dict[Rank, int] = field(default_factory=dict)
    after: dict[tuple[int, str, Any], int] = field(default_factory=dict)
    checked: set[tuple[int, int]] = field(default_factory=set)

    def number(self, rank: Rank) -> int:
        number = self.number_of.setdefault(rank, len(self.ranks))
        if number == len(self.ranks):
            self.ranks.append(rank)
        return number

    def start(self, state: State) -> Key:
        numbers = tuple(sorted(self.number(rank) for rank in state.ranks))
        return numbers, state.store, state.faults, state.is_alike

    def state(self, key: Key) -> State:
        return State(tuple([self.ranks[number] for number in key[0]]), *key[1:])

    def step(self, key: Key, action: Action) -> tuple[list[int], Key]:
        """The ranks after an action, in their places, and sorted; checked."""
        numbers = list(key[0])
        index = action.by
        memo = (numbers[index], action.effect.__name__, action.argument)
        after = self.after.get(memo)
        if after is None:
            rank = action.effect(self.ranks[numbers[index]], action.argument)
            self.after[memo] = after = self.number(rank)
        numbers[index] = after
        for at, number in enumerate(numbers):
            if at != index and (after, number) not in self.checked:
                check_pair(self.ranks[after], self.ranks[number])
                self.checked |= {(after, number), (number, after)}
        store = key[1] if action.store is None else action.store
        is_alike = key[3] and action.is_alike
        return numbers, (tuple(sorted(numbers)), store, key[2] - action.cost, is_alike)


def explore(model: Model, most_states: int = 10_000_000) -> Explored:
    """Every state that can be reached, nearest first.

    Raises: ViolationError.
    """
    book = _Book()
    first = book.start(model.start())
    came_from: dict[Key, tuple[Key, Action] | None] = {first: None}
    waiting = deque([first])
    num_actions = num_rests = 0
    while waiting:
        key = waiting.popleft()
        state = book.state(key)
        can_rest = True
        action = None
        try:
            for action in model.enabled(state):
                num_actions += 1
                can_rest &= action.cost > 0
                _, after = book.step(key, action)
                if after not in came_from:
                    came_from[after] = (key, action)
                    waiting.append(after)
            if can_rest:
                num_rests += 1
                action = None
                check_rest(model, state)
        except AssertionError as error:
            raise ViolationError(_tell(book, came_from, key, action, error)) from error
        assert len(came_from) < most_states, "too many states to explore"
    return Explored(len(came_from), num_actions, num_rests)


def walk(model: Model, seed: int, fault_share: float = 0.02) -> int:
    """Take actions at random until nothing is left to do.

    Args:
        fault_share: how often a fault comes next, if one may.
    Returns:
        how many there were.
    Raises: ViolationError.
    """
    rng = random.Random(seed)
    state = model.start()
    told = [f"seed {seed}"]
    try:
        while True:
            actions = list(model.enabled(state))
            costless = [action for action in actions if action.cost == 0]
            faults = [action for action in actions if action.cost > 0]
            if not costless:
                check_rest(model, state)
                return len(told) - 1
            action = rng.choice(faults if faults and rng.random() < fault_share else costless)
            told.append(f"rank {action.by}: {action.name}")
            state = _step(state, action)
    except AssertionError as error:
        raise ViolationError("\n".join([str(error), *told])) from error


def _step(state: State, action: Action) -> State:
    rank = action.effect(state.ranks[action.by], action.argument)
    others = [other for at, other in enumerate(state.ranks) if at != action.by]
    for other in others:
        check_pair(rank, other)
    others.insert(action.by, rank)
    store = state.store if action.store is None else action.store
    is_alike = state.is_alike and action.is_alike
    return State(tuple(others), store, state.faults - action.cost, is_alike)


def check_pair(one: Rank, other: Rank) -> None:
    """What holds between any two ranks in every state."""
    served = min(one.served, other.served)
    ours, theirs = (
        [commit for commit in rank.committed if commit.at is not None and commit.at <= served]
        for rank in (one, other)
    )
    assert ours == theirs, f"of {served} steps, some were served from different placements"
    if not (one.has_failed or other.has_failed):
        began, they_began = ([at for at in rank.started if at <= served] for rank in (one, other))
        assert began == they_began, "rebalances began at different counts"
    if not (one.is_dead or other.is_dead):
        _check_reads(one, other)
        _check_reads(other, one)


def _check_reads(reader: Rank, writer: Rank) -> None:
    """Nothing is written that is read, nor read before what was there last is complete."""
    for chunk in writer.writing:
        assert reader.has_staged(chunk), (
            "a chunk is written that a rank still reads or does not hold"
        )
        is_late = reader.is_staging and chunk.rebalance < reader.rebalance
        assert not is_late, "a slot is read that is still being written"
    if writer.is_waiting and writer.ledger.offer is not None:
        chunk = find_chunk(writer.ledger.offer.chunk)
        assert reader.has_staged(chunk), "F is bound before all have staged"


def check_rest(model: Model, state: State) -> None:
    """A state in which nothing is left to do is fit to rest in."""
    living = [rank for rank in state.ranks if not rank.is_dead]
    for rank in living:
        assert rank.worker.do is Do.END or rank.is_hung, "a worker waits for ever"
        assert not rank.is_waiting or rank.has_raised, "F waits for ever"
        assert not rank.writing
    whole = [rank for rank in living if not rank.is_cut_off]
    assert len({_decided(rank) for rank in whole}) <= 1, "ranks end with different placements"
    for rank in living if model.one_per_step else ():
        counts = [commit.at for commit in rank.committed if commit.at is not None]
        assert len(set(counts)) == len(counts), "a step commits more than it may"
    if model.raises and any(rank.has_failed for rank in whole):
        assert all(rank.has_raised for rank in living), "a rank has not heard of the failure"
    ended = [rank for rank in whole if not rank.is_hung]
    for rank in ended:
        wanted = {Chunk(rank.rebalance, c) for c in range(model.chunks[rank.rebalance])}
        is_fine = rank.worker.status is Status.FINE
        assert not is_fine or wanted <= _decided(rank), "a rank is fine that misses a chunk"
    if state.is_alike:
        assert len({rank.worker.status for rank in ended}) == 1, "ranks differ in how they fare"
    if state.faults == model.faults:
        for rank in state.ranks:
            assert rank.worker.status is Status.FINE, "failed without a reason"
            assert not rank.has_raised, "raised without a reason"
            assert not rank.ledger.queue, "a chunk is left over"


def _decided(rank: Rank) -> frozenset[Chunk]:
    queued = {find_chunk(due.chunk) for due in rank.ledger.queue}
    return frozenset({commit.chunk for commit in rank.committed} | queued)


def _tell(
    book: _Book,
    came_from: dict[Key, tuple[Key, Action] | None],
    key: Key,
    action: Action | None,
    error: AssertionError,
) -> str:
    """The way to a violation, ranks named as at the start although states forget their order."""
    way: list[tuple[Key, Action]] = []
    reached = key
    while (came := came_from[reached]) is not None:
        way.append(came)
        reached = came[0]
    names = list(range(len(key[0])))
    lines = [str(error)]
    for before, taken in reversed(way):
        numbers, _ = book.step(before, taken)
        shown = _show(book.ranks[numbers[taken.by]])
        lines.append(f"rank {names[taken.by]}: {taken.name}  [{shown}]")
        names = [names[at] for at in sorted(range(len(names)), key=numbers.__getitem__)]
    if action is not None:
        lines.append(f"rank {names[action.by]}: {action.name}")
    return "\n".join(lines)


def _show(rank: Rank) -> str:
    offer = rank.ledger.offer
    queue = ", ".join(f"{due.chunk} at {due.at}" for due in rank.ledger.queue)
    parts = [
        f"F {rank.ledger.steps}{' waits' if rank.is_waiting else ''}",
        f"W {rank.worker.do.name} {rank.rebalance}.{rank.worker.chunk} {rank.worker.status.name}",
        f"offer {offer.chunk} made at {offer.made_at}" if offer else "",
        f"queue {queue}" if queue else "",
    ]
    return "; ".join(part for part in parts if part)
