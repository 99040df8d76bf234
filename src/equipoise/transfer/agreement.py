"""Ranks compare what they are about to do, before anything moves."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping

import torch

from equipoise.comm.exchange import name_ranks
from equipoise.comm.groups import RankGroup
from equipoise.errors import TransferError

_REFUSES, _READY = 0, 1


def agree(
    group: RankGroup,
    facts: Mapping[str, str],
    problem: Exception | None,
    amount: int = 0,
    meanwhile: Callable[[], None] | None = None,
) -> int:
    """Return when every rank has come with the same facts and no problem.

    Args:
        group: of all ranks concerned.
        facts: what must be equal, by a name that an error can use; the same names everywhere.
        problem: why this rank cannot begin, or None.
        amount: a number of this rank's.
        meanwhile: as for `RankGroup.all_gather`.
    Returns:
        The least amount of any rank.
    Collective: every rank of the group, also one with a problem.
    Raises: the problem; TransferError that names ranks which have one or differ from most, on
        every rank; MembershipError if one does not come.
    """
    words = [amount, _REFUSES if problem else _READY, *map(_digest, facts.values())]
    told_here = torch.tensor(words, dtype=torch.int64)
    heard = [t.tolist() for t in group.all_gather(told_here, meanwhile=meanwhile)]
    least = int(min(theirs[0] for theirs in heard))
    told = [tuple(theirs[1:]) for theirs in heard]
    if problem is not None:
        raise problem
    if told[0][0] == _READY and told.count(told[0]) == len(told):
        return least
    refusing = [rank for rank, theirs in enumerate(told) if theirs[0] == _REFUSES]
    if refusing:
        raise TransferError(
            f"rank {group.rank}: nothing was moved, {name_ranks(refusing)} refused to begin: "
            "see the error there",
            rank=group.rank,
            peer=refusing[0],
        )
    # Counter keeps first-come order among equals: rank 0's word decides where there is no most.
    common = Counter(told).most_common(1)[0][0]
    differing = [rank for rank, theirs in enumerate(told) if theirs != common]
    first = told[differing[0]]
    names = [
        name
        for name, ours, theirs in zip(facts, common[1:], first[1:], strict=True)
        if ours != theirs
    ]
    reference = told.index(common)
    raise TransferError(
        f"rank {group.rank}: nothing was moved, {name_ranks(differing)} and rank {reference} "
        f"come with different {', '.join(names)}",
        rank=group.rank,
        peer=differing[0] if group.rank not in differing else reference,
    )


def _digest(text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
