"""SIGTERM while a model is being loaded: nothing is in flight, so the end is soon and in order."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.sessions import end_session, start, wait_until_alone

MOST_S = 120.0
"""A few seconds on a machine that does nothing else."""


@pytest.mark.timeout(400)
def test_a_server_that_loads_ends_at_once(tmp_path: Path) -> None:
    process = start(tmp_path, "equipoise", "serve", "--port=0", "--ranks=2", "--log=log")
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("loading")
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(MOST_S) == 0
        # Ranks that were waited for, whatever that took, would have served.
        assert "serving" not in process.stdout.read()
        # What was being loaded for them ends once it is loaded.
        wait_until_alone(process.pid, began + 300)
    finally:
        end_session(process)
