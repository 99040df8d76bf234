"""The contract of the all-to-all of tokens.

Axis letters: T tokens of this rank, K slots per token, N rows that came to this rank, D hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Dispatched:
    """Rows that came to this rank.

    Attributes:
        hidden_ND: [N, D], hidden states, dtype as sent.
        slot_N: [N] int64, the local slot (0..S-1) that each row is for.
        handle: what `combine` needs to send the outputs home; opaque.
    """

    hidden_ND: Tensor
    slot_N: Tensor
    handle: Any


class TokenDispatcher(ABC):
    """Sends tokens to the ranks of their slots, and the outputs home."""

    name: ClassVar[str]
    """What the registry calls it."""

    @abstractmethod
    def dispatch(self, hidden_TD: Tensor, slot_TK: Tensor) -> Dispatched:
        """Send each token to the ranks that hold its slots.

        Args:
            hidden_TD: [T, D], any float dtype; T may be 0 and differ between ranks.
            slot_TK: [T, K] int64, global slots (0..P-1); -1 goes nowhere.
        Returns:
            The rows for this rank's slots, in an order of the dispatcher's.
        Collective: every rank of the group, in the same order of calls.
        Raises: TransferError within the deadline if a peer does not take part.
        """

    @abstractmethod
    def combine(self, output_ND: Tensor, weight_TK: Tensor, dispatched: Dispatched) -> Tensor:
        """Bring the outputs home and sum them by weight.

        Args:
            output_ND: [N, D], the experts' outputs, row by row as dispatched.
            weight_TK: [T, K], the router's weights on the tokens' own rank.
            dispatched: what `dispatch` returned.
        Returns:
            [T, D] in the dtype of output_ND: the sum over k of weight times output, k ascending; 0
            for a slot of -1.
        Collective: every rank of the group, in the same order of calls.
        Raises: TransferError within the deadline if a peer does not take part.
        """

    def close(self) -> None:  # noqa: B027 - nothing to release unless a backend has something
        """Release what the dispatcher holds; twice is fine.

        Collective: none.
        """
