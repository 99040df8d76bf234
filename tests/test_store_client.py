"""Clients of a store whose process lives, or has gone."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from equipoise.comm.store_client import clone_store
from equipoise.elastic.change_store import ChangeStore, StoreLost
from equipoise.elastic.store import open_store

TIMEOUT_S = 20.0


def connect(port: int) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", port, timeout=timedelta(seconds=TIMEOUT_S))


def test_a_clone_has_the_prefix_and_the_timeout() -> None:
    server = open_store("127.0.0.1", TIMEOUT_S)
    client = connect(server.port)
    prefixed = PrefixStore("outer/", PrefixStore("inner/", client))
    prefixed.set("key", "value")
    assert clone_store(prefixed).check(["key"])
    assert not clone_store(client).check(["key"])
    assert clone_store(client).timeout == timedelta(seconds=TIMEOUT_S)


def test_a_store_that_has_gone_is_asked_nothing() -> None:
    server = open_store("127.0.0.1", TIMEOUT_S)
    client, early = connect(server.port), ChangeStore(connect(server.port), 1)
    early.check()
    del server
    late = ChangeStore(client, 1)
    started = time.monotonic()
    for ask in (early.check, late.check, late.make_client, lambda: late.decide("switch")):
        with pytest.raises(StoreLost, match="the store does not answer"):
            ask()
    with pytest.raises(StoreLost):
        late.hear("ready/rank-0", "rank-0", started + 100.0)
    # torch by itself takes up to three times the timeout for each.
    assert time.monotonic() - started < TIMEOUT_S / 2
