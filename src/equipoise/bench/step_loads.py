"""Loads with the skew of the trace that comes along.

Axis letters: L layers, E experts.
"""

from __future__ import annotations

import numpy as np

from equipoise.bench.step_case import ModelSize
from equipoise.bundled.traces import gptoss_routes
from equipoise.errors import ConfigError
from equipoise.load.trace_files import read_trace
from equipoise.load.trace_routes import Serving
from equipoise.topology import IntArray


def read_shares(size: ModelSize, kind: str) -> IntArray:
    """Loads of the trace that comes along, while it served one kind of text.

    Args:
        size: each of the trace's experts stands for as many neighbours as are needed, and its
            layers come round and round, so that skew and place are the trace's.
        kind: of text, as the trace names it.
    Returns:
        [L, E] int64.
    Collective: none.
    Raises: ConfigError if the trace has no such text, or its experts cannot stand for as many.
    """
    # One sequence at a time: each step is of one kind.
    trace = read_trace(gptoss_routes(), serving=Serving(num_in_flight=1, tokens_per_step=64))
    kinds = sorted(set(trace.phases))
    if kind not in kinds:
        raise ConfigError(f"--kind: the trace has {', '.join(kinds)}, not {kind!r}")
    if size.num_experts % trace.num_experts:
        raise ConfigError(
            f"{size.num_experts} experts are no multiple of the trace's {trace.num_experts}"
        )
    counts = trace.counts[np.array(trace.phases) == kind].sum(axis=0)
    each = size.num_experts // trace.num_experts
    return np.repeat(counts[np.arange(size.num_layers) % trace.num_layers], each, axis=1)
