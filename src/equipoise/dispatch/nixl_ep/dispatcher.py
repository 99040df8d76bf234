"""Tokens by NIXL-EP's low-latency kernels.

Axis letters: T tokens of this rank, K slots per token, S slots per rank, C places for rows of each
slot, N rows that are there, D hidden, H hidden as padded.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn.functional import pad

from equipoise.comm.groups import RankGroup
from equipoise.dispatch.base import Dispatched, DispatchedBlocks, TokenDispatcher
from equipoise.dispatch.nixl_ep.all_to_all import BufferShape, NixlEPAll2AllManager, wire_slots
from equipoise.dispatch.nixl_ep.kernels import MAX_TOP_K
from equipoise.dispatch.rows import dequant_fp8
from equipoise.errors import ConfigError, MembershipError, TransferError
from equipoise.topology import Topology

Fp8 = Literal["no", "float32", "ue8m0"]
"""How rows travel: as bfloat16, or as FP8 with a scale for each 128 elements, of this kind."""

NUM_HANDLES = 2
"""Micro-batches that may be in flight: the buffer has two halves, and a kernel that sends clears
the half that comes next. So one thing alone is on its way at a time."""


@dataclass(frozen=True)
class NixlEPOptions:
    """What the dispatcher needs to know beside the group.

    Attributes:
        manager: the buffer of this process, which its owner closes.
        max_tokens: most tokens of a rank in one dispatch.
        hidden_size: D of the layers.
        fp8: how rows travel to the experts; outputs travel home as bfloat16.
    """

    manager: NixlEPAll2AllManager = field(repr=False, compare=False)
    max_tokens: int
    hidden_size: int
    fp8: Fp8 = "no"


class Blocks(DispatchedBlocks):
    """Rows as the kernels leave them.

    Attributes:
        values_SCH: [S, C, H] bfloat16, or float8_e4m3fn; rows behind a slot's count are noise.
        scales: of FP8 rows, as `dequant_fp8` takes them; None for bfloat16.
        wire_slot_TK: [T, K], as the kernels were given them.
        handle: the kernels'.
        hidden_size: D.
    """

    def __init__(
        self, received: Any, count_S: Tensor, wire_slot_TK: Tensor, handle: Any, hidden_size: int
    ) -> None:
        self.values_SCH: Tensor
        self.scales: Tensor | None
        self.values_SCH, self.scales = received if isinstance(received, tuple) else (received, None)
        self._count_S = count_S
        self.wire_slot_TK = wire_slot_TK
        self.handle = handle
        self.hidden_size = hidden_size

    @property
    def hidden_SCH(self) -> Tensor:
        """[S, C, H] bfloat16, dequantised where rows came as FP8."""
        if self.scales is None:
            return self.values_SCH
        return dequant_fp8(self.values_SCH, self.scales)

    @property
    def hidden_SCD(self) -> Tensor:
        """As the contract says, bfloat16."""
        return _narrow(self.hidden_SCH, self.hidden_size)

    @property
    def count_S(self) -> Tensor:
        """[S] int32."""
        return self._count_S

    @property
    def max_rows(self) -> int:
        """Every place of a token of any rank, in as many slots as it can have here."""
        num_slots, capacity, _ = self.values_SCH.shape
        return capacity * min(num_slots, self.wire_slot_TK.shape[1])

    @property
    def hidden_ND(self) -> Tensor:
        """As the contract says; ordered by slot."""
        rows = self.hidden_SCH.flatten(0, 1)
        return rows.index_select(0, self.place_N)[:, : self.hidden_size]

    @property
    def slot_N(self) -> Tensor:
        """As the contract says."""
        return self.place_N // self.values_SCH.shape[1]

    @cached_property
    def place_N(self) -> Tensor:
        """[N] int64, where rows are among all S * C; waits for the device to know how many."""
        capacity = self.values_SCH.shape[1]
        place_C = torch.arange(capacity, device=self.count_S.device)
        return (place_C < self.count_S[:, None]).flatten().nonzero()[:, 0]


class Sent(NamedTuple):
    """Something under way; `receive` waits for it on the device.

    Attributes:
        blocks: what will be there.
        receive: enqueues the waiting on the current stream; once.
    """

    blocks: Blocks
    receive: Callable[[], None]


class SentHome(NamedTuple):
    """Outputs under way; as `Sent`.

    Attributes:
        combined_TD: what will be there.
        receive: enqueues the waiting on the current stream; once.
    """

    combined_TD: Tensor
    receive: Callable[[], None]


class NixlEPDispatcher(TokenDispatcher):
    """One generation's use of the buffer.

    `dispatch` and `combine` are those of every backend. Whoever takes blocks as they are does not
    wait for the device, so they may stand in a captured graph; to know how many rows came takes one
    wait. By `send` and `send_home` two micro-batches may be in flight: one on its way, while the
    experts compute the other. The first call of a generation connects its ranks and takes the
    buffer over from the one before; the kernels give up a rank that does not answer, and `check`
    tells.

    Args:
        group: the ranks that exchange tokens.
        topology: their slots.
        options: the buffer, and what it is to hold.
    Collective: every rank of the group.
    Raises: ConfigError if the buffer cannot hold it; MembershipError if it has no place for a rank.
    """

    name: ClassVar[str] = "nixl_ep"
    captures: ClassVar[bool] = True

    def __init__(self, group: RankGroup, topology: Topology, options: NixlEPOptions) -> None:
        self._group = group
        self._topology = topology
        self._manager = options.manager
        self._hidden_size = options.hidden_size
        self.members = self._manager.join(group)
        self.shape: BufferShape = self._manager.get_handle(
            max_num_tokens_per_dp_rank=options.max_tokens,
            token_hidden_size=options.hidden_size,
            num_experts_per_rank=topology.slots_per_rank,
        )
        in_order = self.members == tuple(range(group.size))
        self._wire_slot_P1: Tensor | None = (
            None
            if in_order
            else wire_slots(
                self.members, topology.slots_per_rank, group.device, self._manager.index_dtype
            )
        )
        self._slot_dtype = self._manager.index_dtype
        self._options = {
            "use_fp8": options.fp8 != "no",
            "round_scale": options.fp8 == "ue8m0",
            "use_ue8m0": options.fp8 == "ue8m0",
        }
        self._is_entered = False
        self._num_in_flight = 0
        self._is_on_its_way = False

    @property
    def slot_dtype(self) -> torch.dtype:
        """As the kernels want them."""
        return self._slot_dtype

    @property
    def max_tokens(self) -> int:
        """As the buffer holds."""
        return self.shape.max_tokens

    @property
    def prepares_between_steps(self) -> bool:
        """With a NIXL-EP that does not connect ranks while others' tokens travel."""
        return not self._manager.connects_beside_dispatch

    def prepare(self, hidden_TD: Tensor, slot_TK: Tensor) -> None:
        """As the contract says: connect the ranks and leave them masked."""
        del hidden_TD, slot_TK
        self._manager.stage(self._group, self.members)

    def isolate(self) -> TokenDispatcher | None:
        """As the contract says; takes up to `shape.max_tokens` tokens of differing slots.

        Raises: MembershipError if the buffer serves a generation.
        """
        manager = self._manager
        own = (manager.index,)
        if manager.members not in ((), own):
            raise MembershipError(
                f"the NIXL-EP buffer serves the indices {manager.members}: it cannot be tried alone"
            )
        manager.commit(own)
        alone = copy(self)
        alone.members = own
        alone._wire_slot_P1 = wire_slots(
            own, self.shape.slots_per_rank, self._group.device, self._slot_dtype
        )
        alone._is_entered = True
        return alone

    def enter(self) -> None:
        """Connect this generation's ranks and serve it; the first dispatch does it otherwise.

        Collective: every rank of the group, between the same two steps of those that serve.
        Raises: MembershipError if a rank does not come in time.
        """
        if self._is_entered:
            return
        if self._group.device.type == "cuda":
            torch.cuda.synchronize(self._group.device)
        # No rank takes its members over while another still waits for those of before.
        self._group.barrier()
        self._manager.stage(self._group, self.members)
        self._manager.commit(self.members)
        self._group.barrier()
        self._is_entered = True

    def dispatch(self, hidden_TD: Tensor, slot_TK: Tensor) -> Blocks:
        """As the contract says; rows are in blocks."""
        return self._send(hidden_TD, slot_TK, with_hook=False).blocks

    def combine(self, output_ND: Tensor, weight_TK: Tensor, dispatched: Dispatched) -> Tensor:
        """As the contract says; the kernels sum in float32 and round once."""
        assert isinstance(dispatched, Blocks)
        shape_SCH = dispatched.values_SCH.shape
        if output_ND.dim() == 3:
            output_SCH = _widen(output_ND, shape_SCH[2]).contiguous()
        else:
            output_SCH = output_ND.new_empty(shape_SCH)
            rows = _widen(output_ND, shape_SCH[2])
            output_SCH.flatten(0, 1)[dispatched.place_N] = rows
        return self._send_home(output_SCH, weight_TK, dispatched, with_hook=False).combined_TD

    def send(
        self, hidden_TD: Tensor, slot_TK: Tensor, weight_on_input_T1: Tensor | None = None
    ) -> Sent:
        """Begin a dispatch; no host sync, once the generation is entered.

        Args:
            hidden_TD: [T, D] bfloat16, T at most what the buffer holds.
            slot_TK: [T, K], global slots; -1 goes nowhere. K is at most 11, and a token's slots
                differ, as routers choose them: the blocks have no room for more.
            weight_on_input_T1: [T, 1], where top-1 models weigh what experts read; `send_home` is
                then given weights of 1.
        Collective: every rank of the group, in the same order of calls.
        Raises: ConfigError if the kernels cannot take it; TransferError if two are in flight, or
            what was sent before was not received.
        """
        if weight_on_input_T1 is not None:
            if slot_TK.shape[1] != 1:
                raise ConfigError(
                    f"weights go on the input for top-1 alone, not for top-{slot_TK.shape[1]}"
                )
            hidden_TD = (hidden_TD * weight_on_input_T1).to(hidden_TD.dtype)
        return self._send(hidden_TD, slot_TK, with_hook=True)

    def send_home(self, output_SCH: Tensor, weight_TK: Tensor, blocks: Blocks) -> SentHome:
        """Begin a combine; no host sync.

        Args:
            output_SCH: [S, C, H] bfloat16, outputs where the blocks had rows; the rest is not read.
            weight_TK: [T, K], the router's weights.
            blocks: what was received.
        Collective: every rank of the group, in the same order of calls.
        Raises: TransferError if what was sent before was not received.
        """
        return self._send_home(output_SCH, weight_TK, blocks, with_hook=True)

    def check(self) -> None:
        """As the contract says: asks which ranks the kernels gave up. Waits for the device."""
        lost = self._manager.find_lost() if self._is_entered else []
        if lost:
            seconds = self._manager.timeout.total_seconds()
            names = ", ".join(f"rank {rank}" for rank in lost)
            raise TransferError(
                f"rank {self._group.rank}: {names} did not answer within {seconds:.1f} s; the step "
                "is void",
                rank=self._group.rank,
                peer=lost[0],
            )

    def close(self) -> None:
        """Disconnect the ranks that the generation which serves now does not have."""
        serving = self._manager.members
        if self._is_entered and serving != self.members:
            # With them whoever was connected for a generation that never served.
            self._manager.disconnect(sorted(self._manager.connected - set(serving)))
        self._is_entered = False

    # What follows is called twice a layer, and the kernels take as long as it takes to launch them:
    # nothing here asks PyTorch for what is so already.

    def _send(self, hidden_TD: Tensor, slot_TK: Tensor, *, with_hook: bool) -> Sent:
        num_tokens, width = hidden_TD.shape
        if (
            hidden_TD.dtype is not torch.bfloat16
            or width != self._hidden_size
            or num_tokens > self.shape.max_tokens
            or slot_TK.shape[1] > MAX_TOP_K
        ):
            self._refuse(hidden_TD, slot_TK)
        if not self._is_entered:
            self.enter()
        if self._is_on_its_way or self._num_in_flight == NUM_HANDLES:
            self._refuse_to_send()
        if self._wire_slot_P1 is not None:
            slot_TK = self._wire_slot_P1[slot_TK]
        hidden_TH = _lay_out(_widen(hidden_TD, self.shape.hidden_size), torch.bfloat16)
        wire_slot_TK = _lay_out(slot_TK, self._slot_dtype)
        received, count_S, handle, _, hook = self._manager.use(
            self.members,
            lambda buffer: buffer.low_latency_dispatch(
                hidden_TH,
                wire_slot_TK,
                self.shape.max_tokens,
                return_recv_hook=with_hook,
                **self._options,
            ),
        )
        self._num_in_flight += 1
        blocks = Blocks(received, count_S, wire_slot_TK, handle, self._hidden_size)
        return Sent(blocks, self._receive_by(hook))

    def _send_home(
        self, output_SCH: Tensor, weight_TK: Tensor, blocks: Blocks, *, with_hook: bool
    ) -> SentHome:
        if self._is_on_its_way:
            self._refuse_to_send()
        weight_TK = _lay_out(weight_TK, torch.float32)
        combined, _, hook = self._manager.use(
            self.members,
            lambda buffer: buffer.low_latency_combine(
                output_SCH,
                blocks.wire_slot_TK,
                weight_TK,
                blocks.handle,
                return_recv_hook=with_hook,
            ),
        )
        self._num_in_flight -= 1
        return SentHome(_narrow(combined, self._hidden_size), self._receive_by(hook))

    def _receive_by(self, hook: Callable[[], None] | None) -> Callable[[], None]:
        """What waits for what was just sent; nothing where the kernel has waited itself."""
        if hook is None:
            return _wait_for_nothing
        self._is_on_its_way = True

        def receive() -> None:
            hook()
            self._is_on_its_way = False

        return receive

    def _refuse_to_send(self) -> NoReturn:
        raise TransferError(
            "what was sent before has not been received: a kernel that sends now would clear "
            "what it waits for"
            if self._is_on_its_way
            else f"{NUM_HANDLES} micro-batches are in flight already: bring one home first",
            rank=self._group.rank,
        )

    def _refuse(self, hidden_TD: Tensor, slot_TK: Tensor) -> NoReturn:
        num_tokens, width = hidden_TD.shape
        if hidden_TD.dtype != torch.bfloat16:
            raise ConfigError(
                f"nixl_ep carries bfloat16, not {hidden_TD.dtype}: load the model in it, or use "
                "the torch dispatcher"
            )
        if width != self._hidden_size or num_tokens > self.shape.max_tokens:
            raise ConfigError(
                f"{num_tokens} tokens x {width} do not fit a NIXL-EP handle for up to "
                f"{self.shape.max_tokens} x {self._hidden_size}"
            )
        raise ConfigError(
            f"NIXL-EP's kernels have at most {MAX_TOP_K} slots per token, not "
            f"{slot_TK.shape[1]}: use the torch dispatcher"
        )


def _lay_out(values: Tensor, dtype: torch.dtype) -> Tensor:
    if values.dtype is not dtype:
        values = values.to(dtype)
    return values if values.is_contiguous() else values.contiguous()


def _widen(rows: Tensor, width: int) -> Tensor:
    return rows if rows.shape[-1] == width else pad(rows, (0, width - rows.shape[-1]))


def _narrow(rows: Tensor, width: int) -> Tensor:
    return rows if rows.shape[-1] == width else rows[..., :width]


def _wait_for_nothing() -> None:
    pass
