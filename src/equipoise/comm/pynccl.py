"""Experts over an NCCL communicator of our own, made with nccl4py."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, ClassVar

import torch

from equipoise.comm.base import ExpertWeights, GroupCoordinator
from equipoise.comm.byte_views import view_bytes
from equipoise.comm.deadline import call_in_time
from equipoise.comm.exchange import Exchange, deadline_in
from equipoise.comm.nccl import Message, NcclStagedCommunicator
from equipoise.errors import CommunicatorUnavailable

_INSTALL = "pip install 'equipoise[nccl]'"
_TAG_ID = 10
_ID_BYTES = 128


def has_nccl4py() -> bool:
    """Whether nccl4py can be imported here, with the NCCL that it needs. Collective: none."""
    try:
        _load()
    except CommunicatorUnavailable:
        return False
    return True


class PyNcclEplbCommunicator(NcclStagedCommunicator):
    """Grouped ncclSend and ncclRecv on a communicator that nobody else uses.

    Args:
        coordinator: its `cpu_group` carries the unique id, so it need have no NCCL itself.
        expert_weights: as for the base.
        timeout_s: as for the base.
        max_ctas: most thread blocks that a kernel of NCCL's takes, so that it leaves room for
            others; None for NCCL's own choice.
    Collective: every rank of the group.
    Raises: CommunicatorUnavailable if nccl4py is not there; TransferError if NCCL cannot be set
        up, or a rank does not come in time.
    """

    name: ClassVar[str] = "pynccl"

    def __init__(
        self,
        coordinator: GroupCoordinator,
        expert_weights: ExpertWeights,
        timeout_s: float,
        *,
        max_ctas: int | None = None,
    ) -> None:
        self._nccl = _load()
        self._comm: Any = None
        super().__init__(coordinator, expert_weights, timeout_s)
        try:
            self._comm = self._make(self._share_id(), max_ctas)
        except BaseException:
            self.close()
            raise
        self._connect()

    def _share_id(self) -> bytes:
        """Rank 0's, on every rank."""
        exchange = Exchange(self._group, _TAG_ID)
        word = torch.zeros(_ID_BYTES, dtype=torch.uint8)
        if self.rank:
            exchange.recv(word, 0)
        else:
            fresh = bytearray(self._nccl.get_unique_id().as_bytes)
            word = torch.frombuffer(fresh, dtype=torch.uint8)
            for peer in self._peers:
                exchange.send(word, peer)
        failures = exchange.wait(deadline_in(self.timeout_s))
        if failures:
            self._raise({}, failures, self.timeout_s)
        return word.numpy().tobytes()

    def _make(self, unique_id: bytes, max_ctas: int | None) -> Any:
        nccl = self._nccl

        def make() -> Any:
            torch.cuda.set_device(self._device)
            key, config = nccl.UniqueId.from_bytes(unique_id), nccl.NCCLConfig(max_ctas=max_ctas)
            return nccl.Communicator.init(self.size, self.rank, key, config)

        try:
            # NCCL waits for the other ranks without a deadline.
            return call_in_time(make, self._set_up_s)
        except Exception as error:
            raise self._explain_set_up(error) from error

    def _post(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        stream = torch.cuda.current_stream(self._device)
        with self._nccl.group():
            for message in receives:
                self._comm.recv(view_bytes(message.data), message.peer, stream=stream.cuda_stream)
            for message in sends:
                self._comm.send(view_bytes(message.data), message.peer, stream=stream.cuda_stream)

    def _take_abort(self) -> Callable[[], None] | None:
        comm, self._comm = self._comm, None
        return None if comm is None else comm.abort

    def _disconnect(self) -> None:
        # Destroying it would wait for peers to do so, too.
        self._abort()


def _load() -> ModuleType:
    try:
        return importlib.import_module("nccl.core")
    except (ImportError, RuntimeError, OSError) as error:
        raise CommunicatorUnavailable(
            f"the communicator pynccl needs nccl4py: {_INSTALL} ({error})"
        ) from error
