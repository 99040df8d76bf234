"""Takes the memory that a transfer may need, at a time when that is measured."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from equipoise.comm.base import EplbCommunicator, ExpertMoves
from equipoise.comm.groups import RankGroup


def reserve_buffers(
    rows: list[list[Tensor]],
    communicator: EplbCommunicator,
    group: RankGroup,
    staging_bytes: int | None,
) -> None:
    """Pass slots once around the ring of ranks, into staging only.

    As many whole layers as fit the staging buffer, one at least: the most that a chunk can bring.

    Args:
        rows: per layer the weights as [S, row bytes] uint8; not changed.
        communicator: over the ranks of `group`.
        group: all ranks.
        staging_bytes: bound of the staging buffer; None for the largest layer.
    Collective: every rank of the group.
    Raises: TransferError if a peer fails.
    """
    num_slots = rows[0][0].shape[0]
    sizes = num_slots * np.array([sum(t.shape[1] for t in layer) for layer in rows])
    largest_first = np.argsort(-sizes, kind="stable")
    fits = np.cumsum(sizes[largest_first]) <= (staging_bytes or 0)
    layers = np.sort(largest_first[: max(1, int(np.count_nonzero(fits)))])
    num_bytes = int(sizes[layers].sum())
    staging = torch.empty(num_bytes, dtype=torch.uint8, device=rows[0][0].device)
    if group.size == 1 or not communicator.needs_profile_buffer_reservation:
        return
    count = len(layers) * num_slots
    layer = np.repeat(layers, num_slots)
    communicator.add_moves(
        ExpertMoves(
            send_rank=np.full(count, (group.rank + 1) % group.size),
            send_layer=layer,
            send_slot=np.tile(np.arange(num_slots), len(layers)),
            recv_rank=np.full(count, (group.rank - 1) % group.size),
            recv_layer=layer,
            into=staging,
        )
    )
    communicator.execute()
