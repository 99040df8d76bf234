"""Load traces: what they refuse, steps out of routes, round trips."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import ConfigError, TraceError
from equipoise.load.trace import LoadTrace, join_traces, write_trace
from equipoise.load.trace_files import read_trace
from equipoise.load.trace_routes import Routes, Serving, steps_from_routes


def make_routes(lengths, domains=(), num_layers=1):
    """Token t of sequence q goes to expert q, in every layer."""
    experts = np.repeat(np.arange(len(lengths)), lengths).astype(np.uint8)
    experts = np.tile(experts[:, None, None], (1, num_layers, 1))
    return Routes(experts, np.r_[0, np.cumsum(lengths)], domains)


def test_sequences_take_the_place_that_is_free_first():
    counts, phases = steps_from_routes(
        make_routes([3, 1, 2, 1]), None, Serving(num_in_flight=2, tokens_per_step=1)
    )
    # 0 | 0 | 0, and beside it 1 | 2 | 2, then 3 follows in the place that is free first.
    assert counts[:, 0].tolist() == [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
    assert phases == ()


def test_several_tokens_of_a_sequence_share_a_step():
    counts, _ = steps_from_routes(
        make_routes([5, 2]), None, Serving(num_in_flight=2, tokens_per_step=3)
    )
    assert counts[:, 0].tolist() == [[3, 2], [2, 0]]


def test_domains_come_one_after_another_or_mixed():
    routes = make_routes([1, 1, 1, 1], ("b", "a", "b", "a"))
    drifting, phases = steps_from_routes(routes, None, Serving(num_in_flight=1))
    assert drifting[:, 0].argmax(axis=1).tolist() == [1, 3, 0, 2]
    assert phases == ("a", "a", "b", "b")
    mixed, phases = steps_from_routes(routes, None, Serving(num_in_flight=1, order="interleaved"))
    assert mixed[:, 0].argmax(axis=1).tolist() == [1, 0, 3, 2]
    assert phases == ("a", "b", "a", "b")
    with pytest.raises(ConfigError, match="order interleaved needs the domain of each sequence"):
        steps_from_routes(make_routes([1, 1]), None, Serving(order="interleaved"))


@settings(max_examples=30)
@given(data=st.data())
def test_no_token_is_lost_whatever_the_schedule(data):
    lengths = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=8).filter(any))
    serving = Serving(
        num_in_flight=data.draw(st.integers(1, 5)), tokens_per_step=data.draw(st.integers(1, 4))
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    experts = rng.integers(0, 6, size=(sum(lengths), 3, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("equipoise.load.trace_routes.CHUNK_ENTRIES", 12)
        counts, _ = steps_from_routes(Routes(experts, np.r_[0, np.cumsum(lengths)]), 6, serving)
    for layer in range(3):
        total = np.bincount(experts[:, layer].reshape(-1), minlength=6)
        assert counts[:, layer].sum(axis=0).tolist() == total.tolist()
    most = serving.num_in_flight * serving.tokens_per_step * 2
    assert counts.sum(axis=2).max() <= most


def test_missing_routes_are_not_counted():
    experts = np.array([[[0, -1]], [[1, 0]]], dtype=np.int16)
    counts, _ = steps_from_routes(Routes(experts, np.array([0, 2])), 3, Serving(num_in_flight=1))
    assert counts.tolist() == [[[1, 0, 0]], [[1, 1, 0]]]


def test_steps_that_would_fill_the_memory_are_refused(monkeypatch):
    monkeypatch.setattr("equipoise.load.trace_routes.MAX_COUNTS_BYTES", 16)
    with pytest.raises(TraceError, match="take more sequences in flight or tokens per step"):
        steps_from_routes(make_routes([3]), 1, Serving(num_in_flight=1))


@pytest.mark.parametrize(
    ("experts", "offsets", "message"),
    [
        (
            [0, 0, 0, 0],
            [0, 4],
            "experts must be [tokens, layers, top-k] whole numbers, got [4] int64",
        ),
        ([[[0.5]]], [0, 1], "whole numbers, got [1, 1, 1] float64"),
        ([[[0]]], [0], "seq_offsets must be [sequences + 1] whole numbers, got [1] int64"),
        ([[[0]]], [0, 2], "seq_offsets must rise from 0 to the 1 tokens of experts, got 0 to 2"),
        ([[[0]]] * 3, [0, 4, 2, 3], "got 0 to 3, not rising"),
    ],
)
def test_routes_that_do_not_fit_are_refused(experts, offsets, message):
    with pytest.raises(TraceError) as caught:
        Routes(np.array(experts), np.array(offsets))
    assert message in str(caught.value)


def test_counts_are_read_only_and_the_callers_own_stay_free():
    own = np.ones((1, 2, 3), dtype=np.int64)
    trace = LoadTrace(own)
    own[0, 0, 0] = 7
    assert trace.counts[0, 0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        trace.counts[0, 0, 0] = 2


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([[[1, -2]]], "counts: step 0, layer 0, expert 1 has -2: it must be a whole number of"),
        ([[[1, float("nan")]]], "counts: step 0, layer 0, expert 1 has nan: it must be a whole"),
        ([[[1, 1.5]]], "counts: step 0, layer 0, expert 1 has 1.5: it must be a whole number"),
        ([[1, 2]], "counts must be [steps, layers, experts], got [1, 2]"),
        ([[["a"]]], "counts must be whole numbers of tokens, got <U1"),
        (
            [[[1, 2], [3]]],
            "counts must be [layers, experts] or [steps, layers, experts], with rows",
        ),
        ([[[2**61] * 4]], "counts: the sum of all tokens is beyond 64 bits"),
        ([[[0, 0]]], "counts: no tokens at all"),
        (
            [[[0, 0], [1, 2]]],
            "counts: layers 0 to 0 have no tokens: if they are dense, leave them out with first "
            "layer 1",
        ),
        (
            [[[1, 0], [0, 1]], [[1, 0], [0, 0]]],
            "counts: layer 1 has no tokens in step 1, where other layers do",
        ),
    ],
)
def test_counts_that_cannot_be_are_refused(counts, message):
    with pytest.raises(TraceError) as caught:
        LoadTrace(counts)
    assert message in str(caught.value)


def test_an_idle_step_is_one():
    assert LoadTrace(np.array([[[1, 1]], [[0, 0]]])).num_steps == 2


def test_a_written_trace_is_read_back(tmp_path):
    trace = LoadTrace(np.arange(1, 13).reshape(2, 2, 3), phases=("day", "night"))
    path = tmp_path / "day.trace"
    write_trace(trace, path)
    again = read_trace(path)
    assert np.array_equal(again.counts, trace.counts)
    assert (again.is_sum, again.phases) == (False, ("day", "night"))
    assert list(tmp_path.iterdir()) == [path]


def test_a_trace_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_trace(LoadTrace(np.ones((1, 1, 2))), tmp_path / "taken")
    assert list(tmp_path.iterdir()) == [tmp_path / "taken"]


def test_traces_are_played_one_after_another():
    day, night = LoadTrace(np.ones((2, 1, 2)), phases=("a", "b")), LoadTrace(np.ones((1, 1, 2)))
    joined = join_traces([day, night], ["day", "night"])
    assert (joined.num_steps, joined.phases) == (3, ("a", "b", "night"))
    with pytest.raises(TraceError) as caught:
        join_traces([day, LoadTrace(np.ones((1, 1, 3)))], ["day", "other"])
    assert str(caught.value) == (
        "other: 1 layers x 3 experts, but day has 1 x 2; give traces of one model"
    )
