"""The oracle: one rank that holds all slots, so nothing travels.

Axis letters: T tokens, K slots per token, N rows, D hidden.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from equipoise.dispatch.base import Dispatched, DispatchedRows, TokenDispatcher
from equipoise.dispatch.routes import sum_by_weight
from equipoise.errors import ConfigError
from equipoise.topology import Topology


class ReferenceDispatcher(TokenDispatcher):
    """Plain PyTorch, without another rank; rows come sorted by slot, then by token.

    Args:
        topology: of one rank.
    Raises: ConfigError if it has more ranks.
    """

    name: ClassVar[str] = "reference"

    def __init__(self, topology: Topology) -> None:
        if topology.num_ranks != 1:
            raise ConfigError(
                f"the reference dispatcher serves one rank, not {topology.num_ranks}: ask for torch"
            )

    def dispatch(self, hidden_TD: Tensor, slot_TK: Tensor) -> Dispatched:
        """As the contract says. Collective: none."""
        slot_M = slot_TK.reshape(-1)
        row_N = slot_M.argsort(stable=True)
        row_N = row_N[slot_M[row_N] >= 0]
        return DispatchedRows(hidden_TD, row_N // slot_TK.shape[1], slot_M[row_N], row_N)

    def combine(self, output_ND: Tensor, weight_TK: Tensor, dispatched: Dispatched) -> Tensor:
        """As the contract says. Collective: none."""
        assert isinstance(dispatched, DispatchedRows)
        row_N: Tensor = dispatched.handle
        padded = torch.cat((output_ND, output_ND.new_zeros(1, output_ND.shape[1])))
        source_P = row_N.new_full((weight_TK.numel(),), len(row_N))
        source_P[row_N] = torch.arange(len(row_N), device=row_N.device)
        return sum_by_weight(padded, source_P, weight_TK)
