"""Ending what travels over NCCL takes no longer than it is given, whatever NCCL waits for."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import ClassVar, NoReturn, cast

import pytest
import torch

from equipoise.comm.nccl import NcclStagedCommunicator
from equipoise.comm.queued import QueuedCommunicator
from equipoise.errors import TransferError


class Kernels:
    """What was enqueued: under way until it is told to end, as where it waits for a peer."""

    def __init__(self) -> None:
        self.told_to_end = threading.Event()

    def query(self) -> bool:
        return self.told_to_end.is_set()


class Stuck(NcclStagedCommunicator):
    """Without a GPU; what its NCCL does when it is to end is told here."""

    name: ClassVar[str] = "stuck"

    def __init__(self, end: Callable[[], None], kernels: Kernels | None = None) -> None:
        QueuedCommunicator.__init__(self, 0, 2, [], 1.0)
        self._end_all: Callable[[], None] | None = end
        self._wire = cast(torch.cuda.Stream, kernels or Kernels())

    def _begin(self, *_: object) -> NoReturn:
        raise TransferError("rank 1 did not answer within 1.0 s", rank=0, peer=1)

    def _post(self, *_: object) -> None:
        raise AssertionError("nothing is sent")

    def _take_abort(self) -> Callable[[], None] | None:
        end, self._end_all = self._end_all, None
        return end

    def _disconnect(self) -> None:
        self._abort()


def test_nccl_that_waits_for_a_hung_peer_is_not_waited_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    began, is_gone, has_ended = threading.Event(), threading.Event(), threading.Event()

    def wait_for_peer() -> None:
        began.set()
        is_gone.wait(200)
        has_ended.set()

    wire = Stuck(wait_for_peer)
    started = time.monotonic()
    wire._abort()
    # A quarter of the timeout, and what a slow machine takes besides.
    assert time.monotonic() - started < 100
    assert began.wait(100)
    assert not has_ended.is_set()
    assert "rank 0, stuck: NCCL has not let go yet: not within 0.2 s" in caplog.text
    # Closing it does not begin again what goes on.
    wire._disconnect()
    is_gone.set()
    assert has_ended.wait(100)


def test_nccl_that_refuses_to_end_is_no_other_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    def refuse() -> None:
        raise RuntimeError("ncclInternalError")

    Stuck(refuse)._abort()
    assert "NCCL has not let go yet: ncclInternalError" in caplog.text


def test_what_travels_ends_where_the_next_exchange_cannot_begin() -> None:
    kernels = Kernels()
    wire = Stuck(kernels.told_to_end.set, kernels)
    with pytest.raises(TransferError, match="rank 1 did not answer"):
        wire.start()
    # Else it would wait for rank 1 for good, and whoever uses the device for it.
    assert kernels.told_to_end.is_set()


def test_what_has_ended_by_itself_is_not_aborted() -> None:
    kernels = Kernels()
    kernels.told_to_end.set()
    aborted = threading.Event()
    wire = Stuck(aborted.set, kernels)
    with pytest.raises(TransferError, match="rank 1 did not answer"):
        wire.start()
    # The engine's group would go with it.
    assert not aborted.is_set()
