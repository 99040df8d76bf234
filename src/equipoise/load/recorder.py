"""Tokens per slot of the step that runs, counted on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.errors import ConfigError


class LoadRecorder:
    """Counts the tokens that each slot of all ranks is sent by this rank.

    Owner: the forward thread. Buffers keep their addresses and no shape depends on data, so
    `record` may stand in a captured CUDA graph, and `enabled` switches it without a new capture.

    Args:
        num_layers: L, MoE layers.
        num_slots: P, slots of all ranks.
        device: where slot ids will be.
    """

    def __init__(self, num_layers: int, num_slots: int, device: torch.device) -> None:
        # One column more takes what must not count.
        self._buffer = torch.zeros(num_layers, num_slots + 1, dtype=torch.int64, device=device)
        # A view costs as much as an operation, and every step asks for it.
        self._counts = self._buffer[:, :-1]
        self._weight = torch.ones(1, dtype=torch.int64, device=device)
        self._enabled = True

    @property
    def counts(self) -> Tensor:
        """[L, P] int64, a view: tokens per slot since the last `clear`."""
        return self._counts

    @property
    def enabled(self) -> bool:
        """Whether tokens count; off for dummy steps and warm-up. Switches in stream order."""
        return self._enabled

    @enabled.setter
    def enabled(self, on: bool) -> None:
        self._weight.fill_(int(on))
        self._enabled = on

    def record(self, layer: int, slot_ids: Tensor) -> None:
        """Count one token for each slot id.

        Args:
            layer: which MoE layer, 0..L-1.
            slot_ids: any shape, integer, on the recorder's device; global slots 0..P-1, or -1 for
                padding, which is not counted.
        Collective: none; no host sync.
        """
        flat = slot_ids.reshape(-1).to(torch.int64)
        trash = self._buffer.shape[1] - 1
        index = torch.where(flat < 0, trash, flat)
        self._buffer[layer].scatter_add_(0, index, self._weight.expand_as(index))

    def choose_and_record(
        self,
        layer: int,
        expert_TK: Tensor,  # noqa: N803
        turns_EW: Tensor,  # noqa: N803
        num_turns_E: Tensor,  # noqa: N803
        first_position: int | Tensor = 0,
        valid_T: Tensor | None = None,  # noqa: N803
        dtype: torch.dtype = torch.int64,
    ) -> Tensor:
        """Turn experts into slots and count them, in one launch of a kernel on the GPU.

        The same as choosing slots by the placement's maps, and `record`. The maps, the position
        given as a tensor, and `enabled` are read on the device: a captured graph follows them.

        Args:
            layer: which MoE layer, 0..L-1.
            expert_TK: [T, K] integer, the router's choice, on the recorder's device.
            turns_EW: [E, W] int64, the slots that an expert's tokens go to in turn.
            num_turns_E: [E] int64, how many of them take turns, at least 1.
            first_position: global position of token 0, not negative; the others follow by one.
            valid_T: [T] bool, False for padding; None if all are tokens.
            dtype: of the slots.
        Returns:
            [T, K], global slots; -1 for padding, which is not counted.
        Collective: none; no host sync.
        Raises: ConfigError if the recorder is not on a GPU.
        """
        if not self._buffer.is_cuda:
            raise ConfigError(
                f"the recorder's kernel needs a GPU, and its counts are on {self._buffer.device}: "
                "choose slots by the maps, and record them"
            )
        from equipoise.load.choice_kernel import choose_and_count

        return choose_and_count(
            expert_TK.contiguous(),
            turns_EW,
            num_turns_E,
            first_position,
            valid_T,
            self._buffer[layer, :-1],
            self._weight,
            dtype,
        )

    def clear(self) -> None:
        """Start again at zero. Collective: none; no host sync."""
        self._buffer.zero_()
