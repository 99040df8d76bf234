"""One server for tests that leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.serving import KEYS, Running, make_spec, serve


@pytest.fixture(scope="session")
def running() -> Iterator[Running]:
    with serve(make_spec()) as server:
        yield server


@pytest.fixture(scope="session")
def guarded() -> Iterator[Running]:
    """With keys, little room and times that are short, but longer than a busy machine may pause."""
    from equipoise.server.settings import ServerLimits

    limits = ServerLimits(body_bytes=10_000, body_timeout_s=3.0, request_timeout_s=3.0)
    spec = make_spec(max_len=2048, max_batch_size=1, queue_limit=1)
    with serve(spec, keys=KEYS, limits=limits) as server:
        yield server
