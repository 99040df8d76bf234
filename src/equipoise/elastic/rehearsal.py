"""What takes long the first time is done once before a generation serves, beside the one that does.

Libraries connect ranks at their first exchange, load kernels and compile them at their first use:
seconds in which all ranks would wait for one another.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor

from equipoise.dispatch.base import Dispatched, TokenDispatcher
from equipoise.dispatch.reference import ReferenceDispatcher
from equipoise.models.experts import ExpertParallelModel
from equipoise.topology import Topology

_LENGTHS = (64, 1)
"""Tokens of the texts that a newcomer's model is called with: as in a prompt, and in decoding."""
_SIDE = 16
"""Of a matrix that takes no time."""


class _OwnSlots(TokenDispatcher):
    """Sends every token to the first slots of this rank, whichever were chosen."""

    name: ClassVar[str] = "own slots"

    def __init__(self, alone: TokenDispatcher, num_slots: int) -> None:
        self._alone, self._num_slots = alone, num_slots

    @property
    def slot_dtype(self) -> torch.dtype:
        """As the other's."""
        return self._alone.slot_dtype

    def dispatch(self, hidden_TD: Tensor, slot_TK: Tensor) -> Dispatched:  # noqa: N803
        """As the contract says, but for the slots. Collective: none."""
        own = torch.arange(slot_TK.shape[1], dtype=slot_TK.dtype, device=slot_TK.device)
        own = torch.where(own < self._num_slots, own, -1)
        return self._alone.dispatch(hidden_TD, own.expand_as(slot_TK).contiguous())

    def combine(self, output_ND: Tensor, weight_TK: Tensor, dispatched: Dispatched) -> Tensor:  # noqa: N803
        """As the contract says. Collective: none."""
        return self._alone.combine(output_ND, weight_TK, dispatched)

    def check(self) -> None:
        """As the contract says. Collective: none."""
        self._alone.check()


def try_thread(device: torch.device, dtype: torch.dtype | None) -> None:
    """Have libraries make what they keep for each thread: cuBLAS a handle, and its workspace.

    Args:
        device: of this rank.
        dtype: of the weights; None for torch's own.
    Collective: none; the thread that will serve, before it does, on the stream that it will use.
    """
    if device.type == "cuda":
        ones = torch.ones(_SIDE, _SIDE, dtype=dtype, device=device)
        torch.mm(ones, ones)


@torch.inference_mode()
def try_alone(spread: ExpertParallelModel, device: torch.device) -> None:
    """Call a newcomer's model without the other ranks; what it says is of no use.

    Args:
        spread: whole, and serving nothing yet.
        device: of its weights.
    Collective: none; on the stream that will serve, whose memory it leaves behind for that.
    Raises: whatever the model raises if it cannot be called.
    """
    for one in spread.sets:
        num_slots = one.maps.placement.topology.slots_per_rank
        alone = one.dispatcher.isolate() or ReferenceDispatcher(Topology(1, num_slots))
        one.binding.dispatcher = _OwnSlots(alone, num_slots)
        one.recorder.enabled = False
    most = spread.model.get_input_embeddings().num_embeddings
    limits = [one.dispatcher.max_tokens for one in spread.sets]
    longest = min([limit for limit in limits if limit is not None], default=max(_LENGTHS))
    for length in sorted({min(length, longest) for length in _LENGTHS}, reverse=True):
        tokens = torch.arange(length, device=device)[None] % most
        with spread.route(None, 0) as model:
            model(input_ids=tokens, use_cache=False)
    for one in spread.sets:
        # A step asks it, too.
        one.binding.dispatcher.check()
        one.recorder.enabled = True
    spread.bind()


@torch.inference_mode()
def try_choices(spread: ExpertParallelModel, device: torch.device) -> None:
    """Have the kernel that chooses slots compiled for a generation's number of them.

    Args:
        spread: of the generation.
        device: of its weights.
    Collective: none.
    """
    if device.type == "cpu":
        return
    for one in spread.sets:
        recorder, maps = one.recorder, one.maps
        experts = torch.zeros(1, _find_top_k(spread), dtype=torch.int64, device=device)
        valid = torch.ones(1, dtype=torch.bool, device=device)
        positions: list[int | Tensor] = [0]
        if one.dispatcher.captures:
            # As graphs have it, which know no number of the host's.
            positions.append(torch.zeros((), dtype=torch.int64, device=device))
        recorder.enabled = False
        for some, position in product((None, valid), positions):
            turns, dtype = (maps.turns[0], maps.num_turns[0]), one.dispatcher.slot_dtype
            recorder.choose_and_record(0, experts, *turns, position, some, dtype)
        recorder.enabled = True


@torch.inference_mode()
def try_together(
    spread: ExpertParallelModel, device: torch.device, which: Callable[[TokenDispatcher], bool]
) -> None:
    """Have the dispatchers of a generation connect its ranks.

    Args:
        spread: of the generation.
        device: of its weights.
        which: of the dispatchers.
    Collective: every rank of the generation.
    Raises: TransferError or MembershipError within the deadline if a rank does not take part.
    """
    config: Any = spread.model.config.get_text_config()
    width, top_k = config.hidden_size, _find_top_k(spread)
    dtype = spread.model.dtype
    for one in (one for one in spread.sets if which(one.dispatcher)):
        topology = one.maps.placement.topology
        # A token for each rank, to its first slot.
        hidden = torch.zeros(topology.num_ranks, width, dtype=dtype, device=device)
        slots = torch.full((topology.num_ranks, top_k), -1, device=device)
        slots[:, 0] = torch.arange(topology.num_ranks, device=device) * topology.slots_per_rank
        one.dispatcher.prepare(hidden, slots)


def _find_top_k(spread: ExpertParallelModel) -> int:
    return int(getattr(spread.model.config.get_text_config(), "num_experts_per_tok", 1))
