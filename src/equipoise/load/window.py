"""Tokens per expert over the last steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from equipoise.errors import ConfigError


class LoadWindow:
    """Logical load of the last `window_size` steps of this rank, and their running sum.

    Steps are folded from slots to experts by the placement of their own time, so the sums stay
    right when the placement changes within a window. Owner: the forward thread; no host sync.

    Args:
        num_layers: L, MoE layers.
        num_experts: E, experts of each layer.
        window_size: steps kept; memory is window_size * L * E * 4 bytes.
        device: where slot counts are.
    Raises: ConfigError if window_size is below 1.
    """

    def __init__(
        self, num_layers: int, num_experts: int, window_size: int, device: torch.device
    ) -> None:
        if window_size < 1:
            raise ConfigError(f"window_size must be at least 1, got {window_size}")
        # A step's tokens of one expert fit 32 bits; sums are kept in 64.
        self._ring = torch.zeros(
            window_size, num_layers, num_experts, dtype=torch.int32, device=device
        )
        self._sum = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device)
        # One column more takes what empty slots say.
        self._step = torch.zeros(num_layers, num_experts + 1, dtype=torch.int64, device=device)
        # Views that every step needs: to make one costs as much as an operation.
        self._newest = self._step[:, :-1]
        self._rows = self._ring.unbind()
        self._next = 0
        # On a GPU: what takes a step, and what it was bound to.
        self._take: Callable[[int], None] | None = None
        self._taken_from: tuple[Tensor, Tensor] | None = None

    def bind(self, slot_counts: Tensor, expert_to_slots: Tensor) -> None:
        """Have `take` ready for these tensors, rather than at the first step.

        Args:
            slot_counts: as for `take`, and so are the others.
            expert_to_slots: of the placement.
        Collective: none.
        """
        if slot_counts.is_cuda:
            # Not at the top: Triton takes seconds to import, and is not there without CUDA.
            from equipoise.load.window_kernel import bind_step

            window = (self._ring, self._sum, self._newest)
            self._take = bind_step(slot_counts, expert_to_slots, *window)
            self._taken_from = (slot_counts, expert_to_slots)

    def take(self, slot_counts: Tensor, slot_to_expert: Tensor, expert_to_slots: Tensor) -> None:
        """As `push`, and start the counts again at zero; on a GPU in one launch.

        Args:
            slot_counts: [L, P] int64, tokens per slot in this step; none of empty slots.
            slot_to_expert: as for `push`.
            expert_to_slots: [L, E, most] int64, the same placement, padded with -1.
        Collective: none; no host sync.
        """
        if not slot_counts.is_cuda:
            self.push(slot_counts, slot_to_expert)
            slot_counts.zero_()
            return
        known = self._taken_from
        if known is None or known[0] is not slot_counts or known[1] is not expert_to_slots:
            self.bind(slot_counts, expert_to_slots)
        assert self._take is not None, "bound above"
        self._take(self._next)
        self._next = (self._next + 1) % len(self._rows)

    def push(self, slot_counts: Tensor, slot_to_expert: Tensor) -> None:
        """Add a step; the oldest leaves once there are `window_size`.

        Args:
            slot_counts: [L, P] int64, tokens per slot in this step.
            slot_to_expert: [L, P] int64, the placement that the step ran on; -1 for empty slots.
        Collective: none; no host sync.
        """
        # -1 becomes the column more.
        index = slot_to_expert.remainder(self._step.shape[1])
        self._step.zero_().scatter_add_(1, index, slot_counts)
        oldest = self._rows[self._next]
        self._sum.add_(self._newest).sub_(oldest)
        oldest.copy_(self._newest)
        self._next = (self._next + 1) % len(self._rows)

    def newest(self) -> Tensor:
        """[L, E] int64, the last step that was pushed; a view that the next push overwrites."""
        return self._newest

    def sum(self) -> Tensor:
        """[L, E] int64, tokens per expert over the window; a copy. Collective: none."""
        return self._sum.clone()

    def clear(self) -> None:
        """Forget all steps. Collective: none; no host sync."""
        for buffer in (self._ring, self._sum, self._step):
            buffer.zero_()
        self._next = 0
