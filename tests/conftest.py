"""Skips what needs devices that this machine does not have, or more time, and says so."""

from __future__ import annotations

import os
import signal

import hypothesis
import pytest
import torch

from tests.ranks import start_forkserver

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell has what it starts in the background ignore it, and so would all that tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _forkserver() -> None:
    """Which of a worker's tests comes first must not say what its ranks are forked from."""
    start_forkserver()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    num_devices = torch.cuda.device_count()
    for item in items:
        if item.get_closest_marker("more_faults") and not os.environ.get("EQUIPOISE_FAULTS"):
            item.add_marker(pytest.mark.skip(reason="takes long: set EQUIPOISE_FAULTS=1"))
        for marker, wanted in (("gpu", 1), ("multi_gpu", 2)):
            if item.get_closest_marker(marker) and num_devices < wanted:
                reason = f"needs {wanted} CUDA device{'s' * (wanted > 1)}, there are {num_devices}"
                item.add_marker(pytest.mark.skip(reason=reason))
