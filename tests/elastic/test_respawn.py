"""When replacements are tried again, and when no more: no endless loops of ranks that die."""

from __future__ import annotations

from equipoise.elastic.reach import STORE
from equipoise.elastic.respawn import MOST_RECOVERIES, STEADY_S, Recoveries, Respawn


def test_waits_double_after_each_failure_and_end() -> None:
    respawn = Respawn(3, 1.0)
    assert respawn.may_try(0.0)
    respawn.note_failure(100.0)
    assert not respawn.may_try(100.9)
    assert respawn.may_try(101.0)
    respawn.note_failure(110.0)
    assert not respawn.may_try(111.9)
    assert respawn.may_try(112.0)
    respawn.note_failure(120.0)
    assert not respawn.may_try(1e9)
    # Somebody who asks for a change that is done then says that it is worth a try.
    respawn.forget()
    assert respawn.may_try(120.0)


def test_a_replacement_that_dies_at_once_counts_as_one_that_did_not_come() -> None:
    respawn = Respawn(2, 1.0)
    respawn.note_came(["rank-1", "rank-2"], 10.0)
    respawn.note_death("rank-0", 10.5)
    assert respawn.may_try(10.5)
    respawn.note_death("rank-1", 11.0)
    assert not respawn.may_try(11.0)
    respawn.note_came(["rank-1"], 13.0)
    respawn.note_death("rank-1", 13.1)
    assert not respawn.may_try(1e9)


def test_one_that_served_for_a_while_ends_the_count() -> None:
    respawn = Respawn(2, 1.0)
    respawn.note_failure(0.0)
    respawn.note_came(["rank-1"], 2.0)
    respawn.note_death("rank-1", 2.0 + STEADY_S)
    assert respawn.may_try(2.0 + STEADY_S)
    respawn.note_failure(20.0)
    assert respawn.may_try(21.0)


def test_one_that_serves_on_ends_the_count_too_and_once() -> None:
    respawn = Respawn(3, 1.0)
    respawn.note_failure(0.0)
    respawn.note_failure(1.0)
    respawn.note_came(["rank-1"], 2.0)
    respawn.note_came(["rank-3"], 3.0)
    # Another dies, long after.
    respawn.note_death("rank-2", 500.0)
    assert respawn.may_try(500.0)
    respawn.note_failure(501.0)
    assert not respawn.may_try(501.9)
    assert respawn.may_try(502.0)
    respawn.note_failure(502.0)
    respawn.note_failure(510.0)
    assert not respawn.may_try(1e9)


def test_a_rank_that_lacks_the_store_twice_in_a_row_is_gone_on_without() -> None:
    recoveries = Recoveries()
    assert recoveries.choose_cut_off({"rank-2": [STORE]}) == []
    # Its connections had only dropped.
    assert recoveries.choose_cut_off({}) == []
    assert recoveries.choose_cut_off({"rank-2": [STORE], "rank-3": [STORE]}) == []
    assert recoveries.choose_cut_off({"rank-2": [STORE], "rank-1": [STORE]}) == ["rank-2"]
    # Who does not reach a peer is gone on without at once.
    assert recoveries.choose_cut_off({"rank-0": ["rank-4"], "rank-5": [STORE]}) == ["rank-4"]


def test_recoveries_without_a_step_end_unless_fewer_are_left_each_time() -> None:
    recoveries = Recoveries()
    for _ in range(MOST_RECOVERIES):
        assert recoveries.may_try(7, ["a", "b"])
    assert not recoveries.may_try(7, ["a", "b"])
    assert recoveries.may_try(7, ["a"])
    assert recoveries.may_try(8, ["a"])
