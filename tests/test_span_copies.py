"""Copies of spans on the CPU, and where packed copies lie."""

from __future__ import annotations

import numpy as np
import torch

from equipoise.comm.span_copies import SpanCopies, shift
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
