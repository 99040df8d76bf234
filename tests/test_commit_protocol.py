"""The commit agreement under every order of events, and what the exploration would find."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest

from equipoise.balancer.protocol import Answer, Do, Ledger, Worker
from tests.commit_explorer import ViolationError, explore, walk
from tests.commit_model import Model, Rank

EVERY = frozenset(range(1, 100))
FIRST = frozenset([0])

# What is explored, and how many states there are: another number, and something else can happen.
QUICK: list[tuple[int, Model]] = [
    (84169, Model(num_ranks=2, chunks=(3, 2), triggers=EVERY, last_step=3)),
    (10430, Model(num_ranks=2, chunks=(3, 2), triggers=EVERY, last_step=3, num_halves=1)),
    (13969, Model(num_ranks=2, chunks=(2,), last_step=3, margin=2)),
    (51041, Model(num_ranks=2, chunks=(3, 2), triggers=EVERY, last_step=3, one_per_step=True)),
    (14215, Model(num_ranks=2, chunks=(1, 2), orders=FIRST, triggers=EVERY, last_step=3)),
    (38759, Model(num_ranks=3, chunks=(2,), last_step=3)),
    (6421, Model(num_ranks=3, chunks=(1, 1), triggers=EVERY, last_step=3)),
    (153691, Model(num_ranks=2, chunks=(2,), last_step=1, faults=1)),
    (40690, Model(num_ranks=2, chunks=(1, 1), triggers=EVERY, last_step=2, faults=1)),
    (48235, Model(num_ranks=2, chunks=(1, 1), triggers=EVERY, last_step=1, faults=1, raises=True)),
    (56194, Model(num_ranks=2, chunks=(1, 1), orders=FIRST, triggers=EVERY, last_step=1, faults=1)),
    (38199, Model(num_ranks=2, chunks=(1,), last_step=1, faults=2)),
    (60970, Model(num_ranks=2, chunks=(1,), last_step=1, faults=2, raises=True)),
]
LARGE: list[tuple[int, Model]] = [
    (163982, Model(num_ranks=2, chunks=(2,), last_step=1, faults=1, one_per_step=True)),
    (811952, Model(num_ranks=2, chunks=(2,), last_step=3, faults=1, raises=True)),
    (994709, Model(num_ranks=2, chunks=(2, 2), triggers=EVERY, last_step=1, faults=1)),
    (173520, Model(num_ranks=3, chunks=(1,), last_step=0, faults=1)),
    (1093482, Model(num_ranks=3, chunks=(1,), last_step=1, faults=1, raises=True)),
]


def show(value: object) -> str:
    """A test's name."""
    if not isinstance(value, Model):
        return f"{value} states"
    chunks = "+".join(str(count) for count in value.chunks)
    behaviour = ", then raises" if value.raises else ""
    parts = [
        f"{value.num_ranks} ranks",
        f"{chunks} chunks in {value.num_halves} halves",
        f"margin {value.margin}",
        f"{value.faults} faults{behaviour}",
        *(["one chunk a step"] if value.one_per_step else []),
        *(["an order first"] if value.orders else []),
    ]
    return ", ".join(parts)


@pytest.mark.parametrize(("num_states", "model"), QUICK, ids=show)
def test_every_order_ends_well(num_states: int, model: Model) -> None:
    assert explore(model).num_states == num_states


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    "EQUIPOISE_EXPLORE" not in os.environ,
    reason="takes minutes and gigabytes: set EQUIPOISE_EXPLORE to explore further",
)
@pytest.mark.parametrize(("num_states", "model"), LARGE, ids=show)
def test_every_order_ends_well_further_out(num_states: int, model: Model) -> None:
    assert explore(model).num_states == num_states


@pytest.mark.parametrize("raises", [False, True], ids=["disables", "raises"])
@pytest.mark.parametrize("margin", [1, 2])
@pytest.mark.parametrize("num_halves", [1, 2])
def test_random_orders_of_four_ranks_end_well(num_halves: int, margin: int, raises: bool) -> None:
    model = Model(
        num_ranks=4,
        chunks=(4, 1, 3, 3),
        orders=frozenset([1]),
        triggers=EVERY,
        last_step=30,
        faults=2,
        raises=raises,
        margin=margin,
        num_halves=num_halves,
    )
    # Without a fault it takes hundreds of actions; so rare, faults come late in most of them.
    lengths = [walk(model, seed, fault_share=0.002) for seed in range(15)]
    assert max(lengths) > 300


# Ways to get it wrong. Each shows that the explorer sees what it shall see, and why the protocol
# and the threads that keep it do what they do.


class Eager(Worker):
    """Offers what it has staged before it knows that all have."""

    def after(self, answer: Answer) -> Worker:
        after = super().after(answer)
        match self.do:
            case Do.STAGE:
                return replace(after, do=Do.OFFER)
            case Do.OFFER:
                return replace(after, do=Do.MEET)
            case Do.MEET if after.do is Do.OFFER:
                return replace(after, do=Do.COUNT)
        return after


class Early(Worker):
    """Binds a chunk to the least count offered."""

    def _propose(self, counts: Answer) -> Worker:
        return super()._propose([min(counts)] if isinstance(counts, tuple) else counts)


class Rash(Worker):
    """Gives a chunk up without asking the store when it does not hear the others' counts."""

    def after(self, answer: Answer) -> Worker:
        after = super().after(answer)
        return replace(after, do=Do.SETTLE) if self.do is Do.COUNT and answer is None else after


class Stubborn(Worker):
    """Takes its own word for the one that stands."""

    def _take(self, word: Answer) -> Worker:
        return super()._take(self.word)


class Free(Ledger):
    """Never has F wait."""

    is_bound = False


class Single(Ledger):
    """Has room for one decided chunk."""

    def settle(self, chunk: int, word: str) -> Ledger:
        after = super().settle(chunk, word)
        return replace(after, queue=after.queue[-1:])


class Loose(Ledger):
    """Takes a word for whatever is offered now."""

    def settle(self, chunk: int, word: str) -> Ledger:
        return super().settle(self.offer.chunk if self.offer else chunk, word)


class Overwrites(Model):
    """Fills a half that is not empty."""

    def is_free(self, me: Rank, half: int) -> bool:
        return True


class Hurries(Model):
    """Begins while F's last copies are under way."""

    def may_begin(self, me: Rank) -> bool:
        return True


class Guesses(Model):
    """Begins another rebalance once its own worker has ended, whatever the count."""

    def is_over(self, me: Rank) -> bool:
        return me.worker.do is Do.END


class Deaf(Model):
    """F steps on before it hears that its rank is cut off, though W has withdrawn the offer."""

    def sees_cut(self, me: Rank) -> bool:
        return False


class Drops(Model):
    """F raises without committing what was decided."""

    def _raise(self, me: Rank, _: None) -> Rank:
        return me._replace(has_raised=True, ledger=replace(me.ledger, queue=()))


class Crowds(Model):
    """Does not mind how much a step commits."""

    def find_earliest(self, me: Rank) -> int:
        return 0


class Leaves(Model):
    """F raises while an offer stands."""

    def may_leave(self, me: Rank) -> bool:
        return True


WRONG: list[tuple[Model, str]] = [
    (Model(margin=0), "the step before was not waited for"),
    (Model(make_worker=Eager), "F is bound before all have staged"),
    (Model(make_worker=Early), "served from different placements"),
    (Model(make_worker=Rash, faults=1), "served from different placements"),
    (Model(make_worker=Stubborn, faults=1), "served from different placements"),
    (Model(make_ledger=Free), "served from different placements"),
    (Model(make_ledger=Single), "a chunk out of order"),
    (Model(make_ledger=Loose, faults=1), "served from different placements"),
    (Overwrites(chunks=(3,)), "does not hold"),
    (Hurries(chunks=(1, 1), triggers=EVERY), "a slot is read that is still being written"),
    (Guesses(chunks=(1, 1), triggers=EVERY), "began at different counts"),
    (Deaf(faults=1), "served from different placements"),
    (Drops(faults=1, raises=True), "ranks end with different placements"),
    (Crowds(one_per_step=True), "a step commits more than it may"),
    (Leaves(faults=1, raises=True), "ranks end with different placements"),
]


def name_mistake(model: object) -> str:
    if not isinstance(model, Model):
        return ""
    parts: list[Any] = [type(model), model.make_worker, model.make_ledger]
    names = [str(part.__name__) for part in parts if part not in (Model, Worker, Ledger)]
    return names[0] if names else f"margin {model.margin}"


@pytest.mark.parametrize(("model", "finding"), WRONG, ids=name_mistake)
def test_a_mistake_is_found(model: Model, finding: str) -> None:
    with pytest.raises(ViolationError, match=finding):
        explore(model)


def test_a_violation_tells_how_it_came_about() -> None:
    with pytest.raises(ViolationError) as caught:
        explore(Model(num_ranks=2, margin=0))
    what, *way = str(caught.value).splitlines()
    assert what == "the step before was not waited for"
    assert way[0].startswith("rank 0: W begins")
    assert "offer 0 made at 0" in way[-2]
    assert way[-1].endswith(": F closes a step")


def test_random_orders_find_mistakes_too() -> None:
    model = Overwrites(num_ranks=4, chunks=(4,), last_step=30)
    with pytest.raises(ViolationError, match=r"\nseed \d+\nrank \d: "):
        [walk(model, seed) for seed in range(30)]
