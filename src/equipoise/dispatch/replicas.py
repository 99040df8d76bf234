"""Which replica of its expert a token goes to.

Axis letters: T tokens of this rank, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.dispatch.maps import PlacementMaps


def choose_slots(
    maps: PlacementMaps,
    layer: int,
    expert_TK: Tensor,
    first_position: int | Tensor = 0,
    valid_T: Tensor | None = None,
) -> Tensor:
    """Turn experts into slots: replicas take turns by global token position, as the maps say.

    Args:
        maps: the committed placement, on the device of expert_TK.
        layer: which MoE layer.
        expert_TK: [T, K] int64, the router's choice.
        first_position: global position of token 0, not negative; the tokens behind it follow by
            one. A rank that starts elsewhere at each step, and elsewhere than other ranks, spreads
            few tokens as well as many. A 0-d int64 tensor on the device where a graph is captured.
        valid_T: [T] bool, False for padding; None if all are tokens.
    Returns:
        [T, K] int64, global slots; -1 for padding.
    Collective: none; no host sync.
    """
    position_T1 = (
        torch.arange(expert_TK.shape[0], device=expert_TK.device)[:, None] + first_position
    )
    turn_TK = position_T1 % maps.num_turns[layer][expert_TK]
    slot_TK = maps.turns[layer][expert_TK, turn_TK]
    return slot_TK if valid_T is None else slot_TK.masked_fill(~valid_T[:, None], -1)
