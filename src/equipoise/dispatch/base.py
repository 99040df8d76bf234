"""The contract of the all-to-all of tokens.

Axis letters: T tokens of this rank, K slots per token, M token rows that came to this rank, N of
them counted once per slot, S slots of this rank, D hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


class Dispatched(ABC):
    """What came to this rank, row by row in an order of the dispatcher's."""

    @property
    @abstractmethod
    def hidden_ND(self) -> Tensor:
        """[N, D], hidden states, dtype as sent; a token comes once for each slot; a copy."""

    @property
    @abstractmethod
    def slot_N(self) -> Tensor:
        """[N] int64, the local slot (0..S-1) that each row is for."""


@dataclass(frozen=True)
class DispatchedRows(Dispatched):
    """Token rows, each for one slot or for several.

    Attributes:
        received_MD: [M, D], as they came; they may lie apart in memory.
        row_N: [N] int64, which of them each of this rank's computations reads.
        slots: [N] int64, local slots.
        handle: what `combine` needs to send the outputs home; opaque.
    """

    received_MD: Tensor
    row_N: Tensor
    slots: Tensor
    handle: Any

    @property
    def hidden_ND(self) -> Tensor:
        """As the contract says."""
        return self.received_MD.index_select(0, self.row_N)

    @property
    def slot_N(self) -> Tensor:
        """As the contract says."""
        return self.slots


class DispatchedBlocks(Dispatched):
    """Rows that lie in a block per slot, of which as many count as came.

    To take them as they are needs no host sync; to take them row by row does.
    """

    @property
    @abstractmethod
    def hidden_SCD(self) -> Tensor:
        """[S, C, D], C places for each slot; what lies behind a slot's count is noise."""

    @property
    @abstractmethod
    def count_S(self) -> Tensor:
        """[S] integer, rows of each slot."""

    @property
    @abstractmethod
    def max_rows(self) -> int:
        """Most that all counts together can be."""


class TokenDispatcher(ABC):
    """Sends tokens to the ranks of their slots, and the outputs home."""

    name: ClassVar[str]
    """What the registry calls it."""

    captures: ClassVar[bool] = False
    """Whether a forward pass over it may be captured as a CUDA graph, after one outside of any."""

    @property
    def prepares_beside(self) -> bool:
        """Whether `prepare` may go on while several ranks serve over another one of its kind.

        Where not, it may while those take their `detour`.
        """
        return True

    @property
    def prepares_between_steps(self) -> bool:
        """Whether `prepare` is for the thread that serves, if there is one, between two steps."""
        return False

    @property
    def max_tokens(self) -> int | None:
        """Most tokens of a rank in one dispatch; None for any number."""
        return None

    @property
    def slot_dtype(self) -> torch.dtype:
        """Of slot ids that need no conversion; others are converted."""
        return torch.int64

    @abstractmethod
    def dispatch(self, hidden_TD: Tensor, slot_TK: Tensor) -> Dispatched:
        """Send each token to the ranks that hold its slots.

        Args:
            hidden_TD: [T, D], any float dtype that the backend carries; T may be 0 and differ
                between ranks.
            slot_TK: [T, K] integer, global slots (0..P-1); -1 goes nowhere. K is that of all ranks.
        Returns:
            The rows for this rank's slots, in an order of the dispatcher's.
        Collective: every rank of the group, in the same order of calls.
        Raises: TransferError within the deadline if a peer does not take part; ConfigError if the
            backend cannot carry what it is given.
        """

    @abstractmethod
    def combine(self, output_ND: Tensor, weight_TK: Tensor, dispatched: Dispatched) -> Tensor:
        """Bring the outputs home and sum them by weight.

        Args:
            output_ND: [N, D], the experts' outputs, row by row as dispatched; or [S, C, D], where
                they came in blocks.
            weight_TK: [T, K], the router's weights on the tokens' own rank.
            dispatched: what `dispatch` returned.
        Returns:
            [T, D] in the dtype of output_ND: the sum over k of weight times output, k ascending; 0
            for a slot of -1.
        Collective: every rank of the group, in the same order of calls.
        Raises: TransferError within the deadline if a peer does not take part.
        """

    def check(self) -> None:  # noqa: B027 - where exchanges raise themselves there is nothing to ask
        """Find out whether all exchanges so far took place; called once a step, before its results.

        Collective: none; may wait for the device.
        Raises: TransferError that names a rank that did not answer within the deadline.
        """

    def prepare(self, hidden_TD: Tensor, slot_TK: Tensor) -> None:  # noqa: B027 - as above
        """Do once what takes long the first time, beside the generation that serves.

        Args:
            hidden_TD: [T, D], as they will be, of no account.
            slot_TK: [T, K] integer, one of each rank at least.
        Collective: every rank of the group, before `enter`; any thread that is not serving.
        Raises: as `dispatch`; MembershipError if a rank does not come in time.
        """

    def isolate(self) -> TokenDispatcher | None:
        """One of its kind that reaches this rank's own slots alone, to try what takes long once.

        Returns:
            It; None where one that needs no wire does as well.
        Collective: none; before this rank serves any generation. Nobody else uses it meanwhile.
        """
        return None

    def detour(self, is_on: bool) -> None:  # noqa: B027 - where `prepares_beside` none is needed
        """Send tokens so that nothing on the device waits for a peer, or end that; it takes longer.

        Args:
            is_on: from the next exchange on.
        Collective: every rank of the group, between the same two steps; waits for the device.
        Raises: TransferError if the device is not through with earlier exchanges in time.
        """

    def enter(self) -> None:  # noqa: B027 - nothing to take over unless a backend shares something
        """Serve from here on, in place of the generation before; the first dispatch does it else.

        Collective: every rank of the group, between the same two steps of those that serve.
        Raises: MembershipError if a rank does not come in time.
        """

    def close(self) -> None:  # noqa: B027 - nothing to release unless a backend has something
        """Release what the dispatcher holds; twice is fine.

        Collective: none.
        """
