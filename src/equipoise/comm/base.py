"""The contract of a wire for expert weights."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from equipoise.comm.weight_table import WeightTable
from equipoise.topology import IntArray

ExpertWeights = Sequence[Sequence[Tensor]]
"""Per layer the weight tensors of this rank's slots: each [S, ...], the first dimension the slot,
contiguous, storage stable for as long as a communicator knows it."""


class GroupCoordinator(Protocol):
    """Whatever has the two groups of the expert-parallel ranks; a RankGroup, for one."""

    @property
    def cpu_group(self) -> dist.ProcessGroup:
        """With a gloo backend."""

    @property
    def device_group(self) -> dist.ProcessGroup:
        """With the device's own backend, or the other group again."""


@dataclass(frozen=True)
class ExpertMoves:
    """One rank's share of an exchange, as index arrays over the registered weights.

    Both sides order what travels between them alike: by layer, within a layer as they agree on. In
    the order of the sender's slots, those that stand side by side are read as one. On the wire,
    and where it lands, the bytes of a pair of ranks stand together: for each layer, for each tensor
    of the layer, one row per expert.

    Attributes:
        send_rank: [n] int64, destination of each sent expert; ascending.
        send_layer: [n] int64, its layer; ascending within a rank.
        send_slot: [n] int64, the local slot (0..S-1) that holds it.
        recv_rank: [m] int64, source of each received expert; ascending.
        recv_layer: [m] int64, its layer; ascending within a rank.
        into: [bytes] uint8 on the weights' device; the experts of the lowest source rank land from
            its start, those of the next directly behind, and so on.
        recv_slot: [m] int64, the local slot that a received expert lands in, or -1 for `into`; None
            for `into` always. Only a wire that `lands_in_place` takes slots.
    """

    send_rank: IntArray
    send_layer: IntArray
    send_slot: IntArray
    recv_rank: IntArray
    recv_layer: IntArray
    into: Tensor
    recv_slot: IntArray | None = None


MayLand = Callable[[], bool]
"""Whether what an exchange fills is free to be filled; not asked again once it was."""


class EplbCommunicator(ABC):
    """Moves tensors between the ranks of one group.

    Queue with `add_send`, `add_recv` and `add_moves`, then `execute`, or `start` and `finish`. The
    k-th send from A to B meets the k-th receive on B from A. Any dtype and shape travels, by bytes.
    After an error a communicator can only be closed; a new one can be built in the same process.
    """

    name: ClassVar[str]
    """What the registry and `communicator` call it."""

    reason: str = ""
    """Why it is this wire, as `create_eplb_communicator` says; it begins with "auto" where nobody
    asked for a wire by name."""

    needs_profile_buffer_reservation: bool = True
    """Whether a dummy pass at profile time reserves transport buffers; False where a backend
    allocates none late."""

    num_ahead: int = 0
    """Exchanges that travel beside the oldest one, once they were started; 0 where `finish` does it
    all."""

    is_beside_forward: bool = False
    """Set it where a forward pass runs beside exchanges: they then take longer between two looks at
    how far they have come, and leave the interpreter to it."""

    is_alone: bool = False
    """Whether no other thread that has a part in the exchanges waits for the interpreter, as a
    transfer says while it lasts: what has come is then looked for all the time, for a while."""

    can_hold: bool = False
    """Whether `start` takes `may_land`."""

    lands_in_place: bool = False
    """Whether received experts can land in slots, without a copy; never in one that is in use."""

    table: WeightTable | None = None
    """Of the weights that it was made with, once they were checked; None for a wire without one."""

    def register(self, buffer: Tensor) -> contextlib.AbstractContextManager[object]:
        """Make memory known that many exchanges will fill, while the context lasts.

        Never needed; where a wire has to know what it writes to, it saves that for each exchange.

        Args:
            buffer: contiguous, on the weights' device.
        Collective: none.
        """
        del buffer
        return contextlib.nullcontext()

    @abstractmethod
    def add_send(self, tensor: Tensor, dst_rank: int) -> None:
        """Queue a tensor to be sent at the next `execute`.

        Args:
            tensor: any shape and dtype; must not change until `execute` has returned.
            dst_rank: rank of the group, other than this one.
        Collective: none; `execute` meets the peer's `add_recv`.
        Raises: TransferError if the communicator failed or was closed; ValueError on a self-send
            or a rank outside the group.
        """

    @abstractmethod
    def add_recv(self, tensor: Tensor, src_rank: int) -> None:
        """Queue a contiguous tensor to be filled at the next `execute`.

        Args:
            tensor: any shape and dtype, contiguous, the bytes of the sender's tensor.
            src_rank: rank of the group, other than this one.
        Collective: none; `execute` meets the peer's `add_send`.
        Raises: as `add_send`.
        """

    @abstractmethod
    def add_moves(self, moves: ExpertMoves) -> None:
        """Queue experts of the registered weights, without Python per expert.

        Collective: none; every rank with which an expert is exchanged queues its side.
        Raises: TransferError if no weights were registered, or the communicator failed or was
            closed.
        """

    def foresee(self, several: Sequence[ExpertMoves]) -> None:  # noqa: B027 - a wire may not care
        """Say which moves will be queued, each once and as it is given here.

        Never needed; a wire may get ready for all of them at little more than the cost of one.

        Args:
            several: what `add_moves` will be given.
        Collective: none.
        Raises: as `add_moves`.
        """

    def execute(self) -> None:
        """Do all that was queued, and forget it.

        Returns with every receive complete and every sent tensor free to be overwritten.
        Collective: every rank of the group, each the same number of times, also with nothing
            queued.
        Raises: TransferError that names the peer, within the deadline, on every rank concerned.
        """
        self.start()
        self.finish()

    @abstractmethod
    def start(self, may_land: MayLand | None = None) -> None:
        """Begin what was queued, and forget it; `finish` ends it.

        Meanwhile more may be queued and started, so that one exchange travels while another is
        dealt with. Sent tensors must not change, and received ones not be touched, before their
        `finish` has returned.

        Args:
            may_land: for a wire that `can_hold`: received tensors are in use still, and nothing is
                written to them before it says yes. This thread asks it, within `start` and
                `finish`, until it does; what precedes the first byte is done meanwhile.
        Collective: as `execute`, in the same order on every rank.
        Raises: as `execute`.
        """

    def advance(self, patience_s: float = 0.0) -> None:  # noqa: B027 - a wire may get on by itself
        """Bring what was started as far as it goes; never needed.

        Args:
            patience_s: longest wait until all that was started travels; 0 to wait for nothing.
        Collective: none.
        Raises: as `execute`.
        """

    @abstractmethod
    def finish(self, *, may_be_read: bool = False) -> None:
        """Return when the oldest exchange that was started, and not finished, has ended.

        Args:
            may_be_read: peers may then still be reading what was sent, where the wire can say so
                earlier: for who hears from all of them before it changes any of it.
        Collective: as `execute`.
        Raises: as `execute`; TransferError if none was started.
        """

    def interrupt(self) -> None:  # noqa: B027 - where a wire cannot, that is all
        """From another thread: have `finish` fail soon, where it waits for a peer, and from now on.

        Where a wire cannot, it fails at its deadline.
        Collective: none.
        """

    @abstractmethod
    def set_stream(self, stream: torch.cuda.Stream | None) -> None:
        """Use this CUDA stream for what follows; None: the current one at each call.

        Collective: none.
        """

    @abstractmethod
    def close(self) -> None:
        """Release what the communicator holds; twice is fine.

        Collective: none; waits for a peer a second at most, where an exchange is under way.
        """
