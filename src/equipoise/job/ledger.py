"""Figures of steps: kept by each rank, merged over ranks now and then.

Axis letters: L layers, E experts, P slots, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from equipoise.comm.groups import RankGroup
from equipoise.engine.figures import StepFigures
from equipoise.job.records import Pass, StepRecord
from equipoise.placement import Placement
from equipoise.topology import IntArray

_NO_KIND = -1
"""Kind of a step in which a rank, or every rank, has nothing running."""
_MIXED = -2
"""Kind of a step in which several kinds of text are running."""
_NUM_SCALARS = 5


def merge_steps(
    group: RankGroup,
    steps: Sequence[StepFigures],
    *,
    first_step: int,
    in_pass: Pass,
    kinds: Sequence[str],
    has_work: bool,
) -> tuple[list[StepRecord], bool]:
    """Merge the figures of the same steps of all ranks, in one exchange.

    Args:
        group: the ranks.
        steps: at least one, as many on every rank; with the load of the model's one set.
        first_step: number of the first.
        in_pass: which pass they belong to.
        kinds: names of the kinds.
        has_work: whether this rank has requests left.
    Returns:
        One record per step in which any rank had a token, and whether any rank has requests
        left; the records are empty on other ranks than 0.
    Collective: every rank of the group.
    Raises: MembershipError within the deadline if a rank does not take part.
    """
    counts = torch.stack([step.loads[0].slot_count for step in steps]).flatten(1)
    scalars = [
        [s.num_tokens, s.num_new_tokens, _find_kind(s.kinds), s.expert_cpu_s, s.step_s]
        for s in steps
    ]
    # float64 holds counts exactly up to 2**53.
    rows = torch.cat([torch.tensor(scalars, dtype=torch.float64), counts.cpu().double()], dim=1)
    flag = torch.tensor([float(has_work)], dtype=torch.float64)
    gathered = torch.stack(group.all_gather(torch.cat([flag, rows.flatten()])))
    anybody_works = bool(gathered[:, 0].any())
    if group.rank != 0:
        return [], anybody_works
    merged = gathered[:, 1:].view(group.size, len(steps), -1).numpy()
    records = [
        _merge_step(merged[:, i], step.loads[0].placement, first_step + i, in_pass, kinds)
        for i, step in enumerate(steps)
        if merged[:, i, 0].any()
    ]
    return records, anybody_works


def _find_kind(kinds: frozenset[int]) -> int:
    return _MIXED if len(kinds) > 1 else next(iter(kinds), _NO_KIND)


def _merge_step(
    ranks: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
    placement: Placement,
    step: int,
    in_pass: Pass,
    kinds: Sequence[str],
) -> StepRecord:
    """`ranks`: [R, scalars + L * P]."""
    num_tokens, num_new_tokens, kind, expert_cpu_s, step_s = ranks[:, :_NUM_SCALARS].T
    in_flight = {int(k) for k in kind} - {_NO_KIND}
    only = in_flight.pop() if len(in_flight) == 1 else _MIXED
    slot_count = ranks[:, _NUM_SCALARS:].sum(axis=0).astype(np.int64)
    slot_count = slot_count.reshape(placement.slot_to_expert.shape)
    return StepRecord(
        in_pass=in_pass,
        step=step,
        kind=None if only == _MIXED else kinds[only],
        num_tokens=int(num_tokens.sum()),
        num_new_tokens=int(num_new_tokens.sum()),
        logical_count=_fold(slot_count, placement),
        slot_count=slot_count,
        placement=placement,
        expert_cpu_s=expert_cpu_s.copy(),
        step_s=float(step_s.max()),
    )


def _fold(slot_count: IntArray, placement: Placement) -> IntArray:
    """[L, P] tokens per slot -> [L, E] tokens per expert; empty slots have none."""
    logical = np.zeros((placement.num_layers, placement.num_experts), dtype=np.int64)
    layer = np.arange(placement.num_layers)[:, None]
    np.add.at(logical, (layer, np.maximum(placement.slot_to_expert, 0)), slot_count)
    return logical
