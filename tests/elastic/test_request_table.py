"""Requests as the controller keeps them: each token once and in order, whoever has them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.elastic.requests import RequestTable, read_delta, read_sampling, write_delta
from equipoise.elastic.service import QueueFull, RequestFailed, ServiceRequest
from equipoise.engine.requests import Delta, SamplingParams
from equipoise.errors import ConfigError


def make_request(key: str) -> ServiceRequest:
    return ServiceRequest(key, (1, 2, 3), SamplingParams(max_new_tokens=4, stop=("end",)))


class Heard:
    """What became of requests, as their clients hear it."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def pass_on(self, deliveries: list[Any]) -> None:
        for deliver, event in deliveries:
            deliver(event)

    def tokens(self, key: str) -> list[int]:
        told: list[int] = []
        for event in self.events:
            if isinstance(event, Delta) and event.request_id == key:
                assert event.position == len(told)
                told += event.tokens
        return told


def fill(table: RequestTable, heard: Heard, *keys: str) -> None:
    for key in keys:
        table.add(make_request(key), heard.events.append)


def test_the_rank_with_most_room_gets_the_next_request() -> None:
    table, heard = RequestTable(10), Heard()
    fill(table, heard, *"abcde")
    given_to = [(one.request.id, one.rank) for one in table.assign({"x": 1, "y": 3})]
    assert given_to == [("a", "y"), ("b", "y"), ("c", "x"), ("d", "y")]
    assert table.held() == {"x": 1, "y": 3}
    assert (table.num_waiting, table.num_held, table.num_unfinished) == (1, 4, 5)
    assert table.assign({"x": 1, "y": 3}) == []
    assert table.assign({}) == []


def test_a_full_queue_and_a_used_id_are_refused() -> None:
    table, heard = RequestTable(2), Heard()
    fill(table, heard, "a", "b")
    with pytest.raises(QueueFull, match="2 requests wait already"):
        fill(table, heard, "c")
    table.assign({"x": 2})
    with pytest.raises(ConfigError, match="'a' has not ended yet"):
        fill(table, heard, "a")
    assert table.counts()["submitted"] == 2


def test_a_request_that_is_taken_away_goes_on_elsewhere_before_all_others() -> None:
    table, heard = RequestTable(10), Heard()
    fill(table, heard, "a", "b", "c")
    table.assign({"x": 2})
    heard.pass_on(table.take("x", 1, Delta("b", 0, (7, 8))))
    assert table.release("x") == 2
    again = table.assign({"y": 3})
    assert [(one.request.id, one.generated, one.attempt) for one in again] == [
        ("a", (), 2),
        ("b", (7, 8), 2),
        ("c", (), 1),
    ]
    # What the rank before still says does not count, nor what was delivered before.
    heard.pass_on(table.take("x", 1, Delta("b", 2, (9,), "stop")))
    heard.pass_on(table.take("y", 1, Delta("b", 2, (9,), "stop")))
    assert heard.tokens("b") == [7, 8]
    heard.pass_on(table.take("y", 2, Delta("b", 1, (8, 9), "length")))
    assert heard.tokens("b") == [7, 8, 9]
    assert heard.events[-1] == Delta("b", 2, (9,), "length")
    heard.pass_on(table.take("y", 2, Delta("b", 3, (10,), "length")))
    assert heard.tokens("b") == [7, 8, 9]
    assert table.counts()["finished"] == 1
    assert table.counts()["rerun"] == 2


def test_tokens_with_a_gap_before_them_are_not_delivered() -> None:
    table, heard = RequestTable(10), Heard()
    fill(table, heard, "a")
    table.assign({"x": 1})
    with pytest.raises(ValueError, match="x says token 1 of request 'a' next, but 0 came before"):
        table.take("x", 1, Delta("a", 1, (5,)))


def test_a_request_ends_once_however_it_ends() -> None:
    table, heard = RequestTable(10), Heard()
    fill(table, heard, "waits", "runs", "fails")
    table.assign({"x": 0})
    deliveries, rank = table.cancel("waits")
    assert rank is None
    heard.pass_on(deliveries)
    assert heard.events == [Delta("waits", 0, (), "cancelled")]
    table.assign({"x": 1})
    assert table.cancel("runs") == ([], "x")
    assert table.cancel("unknown") == ([], None)
    heard.pass_on(table.take("x", 1, Delta("runs", 0, (), "cancelled")))
    assert not table.wait_empty(0.0)
    heard.pass_on(table.fail("no rank is left"))
    assert heard.events[-1] == RequestFailed("fails", "no rank is left")
    assert table.fail("again") == []
    assert table.wait_empty(0.0)
    counts = table.counts()
    assert (counts["cancelled"], counts["failed"], counts["finished"]) == (2, 1, 0)


def test_what_travels_arrives_as_it_was() -> None:
    request = make_request("a")
    table, heard = RequestTable(1), Heard()
    table.add(request, heard.events.append)
    (given_out,) = table.assign({"x": 1})
    assert read_sampling(given_out.to_json()["sampling"]) == request.sampling
    delta = Delta("a", 3, (1, 2), "stop")
    assert read_delta(write_delta(delta, 5)) == (5, delta)


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(st.sampled_from(["step", "lose", "repeat", "stale"]), st.integers(0, 2)),
        max_size=60,
    )
)
def test_whatever_ranks_do_tokens_come_once_and_in_order(story: list[tuple[str, int]]) -> None:
    """Three ranks that step, die, repeat what they said, and speak of what they no longer have."""
    table, heard = RequestTable(100), Heard()
    keys = [f"r{number}" for number in range(7)]
    fill(table, heard, *keys)
    held: dict[str, dict[str, tuple[int, int]]] = {name: {} for name in "xyz"}
    lost: list[tuple[str, str, int]] = []
    for what, number in [*story, *[("step", n % 3) for n in range(60)]]:
        for one in table.assign(dict.fromkeys(held, 3)):
            held[one.rank][one.request.id] = (one.attempt, len(one.generated))
        name = "xyz"[number]
        if what == "lose":
            lost += [(name, key, attempt) for key, (attempt, _) in held[name].items()]
            held[name].clear()
            table.release(name)
        elif what == "stale" and lost:
            rank, key, attempt = lost[-1]
            heard.pass_on(table.take(rank, attempt, Delta(key, 0, (99,), "stop")))
        else:
            for key, (attempt, position) in list(held[name].items()):
                begin = 0 if what == "repeat" else position
                tokens = tuple(range(begin, position + 1))
                ended = "length" if position == 4 else None
                heard.pass_on(table.take(name, attempt, Delta(key, begin, tokens, ended)))
                held[name][key] = (attempt, position + 1)
                if ended:
                    del held[name][key]
    assert all(heard.tokens(key) == [0, 1, 2, 3, 4] for key in keys)
    assert table.wait_empty(0.0)
    assert table.counts()["finished"] == len(keys)


def test_requests_of_a_controller_that_has_gone_are_kept_until_asked_for() -> None:
    table, heard = RequestTable(8), []
    told = {"id": "a", "tokens": [1], "sampling": {"max_new_tokens": 8}, "attempt": 2}
    assert table.adopt("rank-0", {**told, "generated": [5, 6], "finish_reason": None})
    # Another rank had it before.
    assert not table.adopt(
        "rank-1", {**told, "attempt": 1, "generated": [5], "finish_reason": None}
    )
    ended = {**told, "id": "b", "generated": [3, 4], "finish_reason": "length"}
    assert table.adopt("rank-1", ended)
    assert not table.adopt("rank-1", ended)
    assert set(table.list_unclaimed()) == {"a", "b"}
    assert table.take("rank-0", 2, Delta("a", 2, (7,))) == []
    assert table.held() == {"rank-0": 1}
    assert table.num_unfinished == 1

    with pytest.raises(ConfigError, match="has 3 tokens so far, and 4 is behind them"):
        table.take_up("a", 4, heard.append)
    assert table.take_up("a", 1, heard.append) == [(heard.append, Delta("a", 1, (6, 7)))]
    with pytest.raises(ConfigError, match="was not taken over, or has been asked for"):
        table.take_up("a", 1, heard.append)
    assert table.take("rank-0", 2, Delta("a", 3, (8,), "stop")) == [
        (heard.append, Delta("a", 3, (8,), "stop"))
    ]
    assert table.take_up("b", 2, heard.append) == [(heard.append, Delta("b", 2, (), "length"))]
    assert table.list_unclaimed() == ()

    # It ends before anybody asks; or is not wanted.
    for key in ("c", "d"):
        table.adopt("rank-0", {**told, "id": key, "generated": [], "finish_reason": None})
        table.take("rank-0", 2, Delta(key, 0, (9,), "stop"))
    table.cancel("d")
    assert table.list_unclaimed() == ("c",)
    assert table.take_up("c", 0, heard.append) == [(heard.append, Delta("c", 0, (9,), "stop"))]
    assert table.wait_empty(0.0)
