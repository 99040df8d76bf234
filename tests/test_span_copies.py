"""Copies of spans on the CPU, and where packed copies lie."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from equipoise.comm.span_copies import SpanCopies, shift, split_programs
from equipoise.comm.spans import Spans


def test_spans_are_copied_when_run_returns() -> None:
    source = torch.arange(100, dtype=torch.uint8)
    target = torch.zeros(100, dtype=torch.uint8)
    here = Spans(source.data_ptr() + np.array([90, 5, 40]), np.array([10, 1, 20]))
    copies = SpanCopies(here, shift(here, target.data_ptr() + 3), source.device, target)
    assert not target.any()
    copies.run()
    wanted = [0, 0, 0, *range(90, 100), 5, *range(40, 60)]
    assert target[: len(wanted)].tolist() == wanted
    assert not target[len(wanted) :].any()


@pytest.mark.parametrize(
    ("most", "num_spans", "num_shares", "wanted"),
    [
        (64, 25, 25 * 84, (1, 64)),  # Long ones, one after the other by all.
        (64, 80, 80 * 18, (3, 21)),
        (64, 1000, 0, (64, 1)),  # Short ones, by one program each.
        (64, 3, 0, (3, 21)),
        (48, 1, 1, (1, 48)),
        (1, 7, 100, (1, 1)),
    ],
)
def test_programs_share_spans_out(
    most: int, num_spans: int, num_shares: int, wanted: tuple[int, int]
) -> None:
    assert split_programs(most, num_spans, num_shares) == wanted
