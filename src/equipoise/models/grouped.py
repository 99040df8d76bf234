"""Experts by PyTorch's grouped matmul, on rows as dispatch leaves them.

Activation, gate, biases and the layout of the weights are the family's own, as transformers
describes them on the module. Axis letters: S slots of this rank, M rows that came, N rows computed,
one per slot, C places of each slot's block, B rows computed of blocks, D hidden, I intermediate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm

from equipoise.comm.byte_views import view_widest

_DESCRIPTION = ("has_gate", "has_bias", "is_transposed", "down_proj")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of weights as they are multiplied; what is quantised is its family's own business."""
_MOST_SHORT = torch.iinfo(torch.int16).max


def computes_grouped(experts: nn.Module) -> bool:
    """Whether a module is configured for grouped matmul, and describes itself for it."""
    config: Any = getattr(experts, "config", None)
    return (
        getattr(config, "_experts_implementation", None) == "grouped_mm"
        and all(hasattr(experts, name) for name in _DESCRIPTION)
        and getattr(experts.down_proj, "dtype", None) in _DTYPES
    )


def compute_rows(experts: Any, hidden_MD: Tensor, row_N: Tensor, slot_N: Tensor) -> Tensor:
    """Compute rows as they came.

    Little is asked of the device before the first product: where a host waits for counts, the
    device waits for all of that.

    Args:
        experts: as `compute_sorted`.
        hidden_MD: [M, D], which may lie apart in memory.
        row_N: [N] int64, which of them each output is of; N at least 1.
        slot_N: [N] int64, for which slot, in no order.
    Returns:
        [N, D] in the dtype of `hidden_MD`, to the bit what the family's own forward gives.
    Collective: none; no host sync.
    """
    num_slots = experts.down_proj.shape[0]
    # A sort of short keys takes a quarter of the passes.
    short = torch.int16 if num_slots <= _MOST_SHORT else torch.int64
    key_N, order_N = slot_N.to(short).sort(stable=True)
    hidden_ND = hidden_MD.index_select(0, row_N.index_select(0, order_N))
    slot_S = torch.arange(num_slots, dtype=short, device=slot_N.device)
    end_S = torch.searchsorted(key_N, slot_S, right=True, out_int32=True)
    slot_N = key_N.long() if experts.has_bias else key_N
    output_ND = compute_sorted(experts, hidden_ND.to(experts.down_proj.dtype), slot_N, end_S)
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    return output_ND.index_select(0, place_N).to(hidden_MD.dtype)


def compute_sorted(experts: Any, hidden_ND: Tensor, slot_N: Tensor, end_S: Tensor) -> Tensor:
    """Compute rows that lie slot by slot.

    Args:
        experts: the module, whose first dimensions are this rank's slots.
        hidden_ND: [N, D], in the dtype of the weights.
        slot_N: [N] integer, ascending, all of them slots; int64 where experts have biases.
        end_S: [S] int32, where the rows of each slot end; rows behind the last are left undefined.
    Returns:
        [N, D].
    Collective: none; no host sync.
    """
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    inner_NI = _project(experts, name, hidden_ND, slot_N, end_S)
    inner_NI = experts._apply_gate(inner_NI) if experts.has_gate else experts.act_fn(inner_NI)
    output_ND = _project(experts, "down_proj", inner_NI, slot_N, end_S)
    if getattr(experts, "has_post_expert_norm", False):
        output_ND = experts.post_expert_norm(output_ND)
    return output_ND


def compute_blocks(experts: Any, hidden_SCD: Tensor, count_S: Tensor, max_rows: int) -> Tensor:
    """Compute rows that lie in a block per slot.

    Args:
        experts: as `compute_sorted`.
        hidden_SCD: [S, C, D]; rows behind a slot's count may be anything.
        count_S: [S] integer.
        max_rows: B, more than all counts together can ever be; what is computed in memory.
    Returns:
        [S, C, D], undefined behind a slot's count.
    Collective: none; no host sync.
    """
    num_slots, capacity, width = hidden_SCD.shape
    num_rows = min(max_rows, num_slots * capacity)
    end_S = count_S.cumsum(0)
    row_B = torch.arange(num_rows, device=count_S.device)
    slot_B = torch.searchsorted(end_S, row_B, right=True)
    is_row_B = slot_B < num_slots
    slot_B = slot_B.clamp(max=num_slots - 1)
    place_B = slot_B * capacity + row_B - (end_S - count_S)[slot_B]
    place_B = torch.where(is_row_B, place_B, num_slots * capacity)
    # One row more: what is no row reads and writes it.
    read_B = place_B.clamp(max=num_slots * capacity - 1)
    hidden_BD = hidden_SCD.flatten(0, 1).index_select(0, read_B)
    output_BD = compute_sorted(experts, hidden_BD, slot_B, end_S.int())
    output = hidden_SCD.new_empty(num_slots * capacity + 1, width)
    wide, wide_BD = view_widest(output, output_BD)
    wide.index_copy_(0, place_B, wide_BD)
    return output[:-1].view(num_slots, capacity, width)


def _project(experts: Any, name: str, rows: Tensor, slot_N: Tensor, end_S: Tensor) -> Tensor:
    weight = getattr(experts, name)
    # transformers has [S, out, in] unless it says transposed; grouped_mm wants [S, in, out].
    matrix = weight if experts.is_transposed else weight.transpose(-2, -1)
    projected = grouped_mm(rows, matrix, offs=end_S)
    return projected + getattr(experts, f"{name}_bias")[slot_N] if experts.has_bias else projected
