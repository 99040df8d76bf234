"""A service of a model so small that faults, not steps, take its time; and its answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from equipoise.bench.random_model import write_random_model
from equipoise.config import EPLBConfig
from equipoise.elastic.spec import ServiceSpec
from tests.faults.answers import Answers, find_answers

SILENCE_S = 6.0
TIMEOUT_S = 8.0
PATIENCE_S = 120.0
"""Nothing may take longer, on the slowest machine, than this; what does, hangs."""


def make_service(directory: Path, communicator: str, **options: Any) -> tuple[ServiceSpec, Answers]:
    """Write a model and say how three ranks serve it: they rebalance often, and replace the dead.

    Args:
        directory: gets the model.
        communicator: that carries experts.
        options: of the service that differ.
    Returns:
        What a controller is given; prompts with their answers.
    """
    write_random_model(directory, 3e5, num_layers=2, num_experts=8)
    spec = ServiceSpec(
        directory,
        3,
        config=EPLBConfig(window_size=8, step_interval=24, communicator=communicator),
        max_batch_size=4,
        max_len=32,
        timeout_s=TIMEOUT_S,
        silence_s=SILENCE_S,
        change_s=20.0,
        orphan_s=5.0,
        respawn=True,
        respawn_s=0.05,
        respawn_tries=1000,
    )
    return replace(spec, **options), find_answers(directory, 24, 6, 12)
