"""A family on four ranks beside the plain model, through several rebalances."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from equipoise import EPLBConfig, ParallelModel, parallelize
from equipoise.comm.groups import RankGroup
from tests.models.thread_ranks import ThreadRanks
from tests.models.tiny import VOCABULARY, Family, make_tiny, run

RANKS, REBALANCES = 4, 3
CONFIG = EPLBConfig(
    window_size=1,
    step_interval=1,
    num_redundant_experts=RANKS,
    policy="deepseek",
    communicator="torch_gloo",
    use_async=False,
)


@dataclass(frozen=True)
class Difference:
    """How far logits are from the plain model's, at the largest, with one kind of kernels.

    Attributes:
        kernels: the implementation that both computed with.
        identical: whether every bit was the same.
        largest: absolute.
        own: largest difference of the plain model's logits between its own implementations.
    """

    kernels: str
    identical: bool
    largest: float
    own: float


@dataclass(frozen=True)
class Step:
    """One forward pass of all ranks, and the rebalance behind it."""

    differences: list[Difference]
    moves: int
    most_replicas: int


def compare(family: Family, ranks: ThreadRanks) -> Iterator[Step]:
    """Serve other tokens on each rank and at each step, and rebalance in between."""
    plain = make_tiny(family)
    parallels = ranks(lambda group: parallelize(copy.deepcopy(plain), group, CONFIG))
    try:
        for step in range(REBALANCES + 1):
            differences = _serve(family, plain, parallels, ranks, step)
            outcomes = ranks(lambda group: parallels[group.rank].step())[0]
            yield Step(
                differences,
                sum(outcome.moves for outcome in outcomes),
                max(int(o.placement.replica_counts.max()) for o in outcomes),
            )
    finally:
        ranks(lambda group: parallels[group.rank].close())


def _serve(
    family: Family, plain: Any, parallels: list[ParallelModel], ranks: ThreadRanks, step: int
) -> list[Difference]:
    random = torch.Generator().manual_seed(step)
    # Few kinds of token, others at each step, so that experts are loaded unevenly.
    first = VOCABULARY // 5 * (step % 4) + 3
    batches = [
        torch.randint(first, first + 12, (1, 16 + 4 * rank), generator=random)
        for rank in range(RANKS)
    ]
    wanted: dict[str, list[torch.Tensor]] = {}
    got: dict[str, list[torch.Tensor]] = {}
    for kernels in family.kernels:
        _choose(plain, kernels, family)
        wanted[kernels] = [run(plain, batch) for batch in batches]

        def serve(group: RankGroup, kernels: str = kernels) -> torch.Tensor:
            parallel = parallels[group.rank]
            _choose(parallel.model, kernels, family)
            with parallel.route():
                return run(parallel.model, batches[group.rank])

        got[kernels] = ranks(serve)
    for logits in wanted[family.kernels[0]]:
        assert logits.isfinite().all()
        assert logits.std() > 0.01
    pairs = combinations(family.kernels, 2)
    own = max((_measure(wanted[one], wanted[other]) for one, other in pairs), default=0.0)
    return [
        Difference(
            kernels,
            all(map(torch.equal, got[kernels], wanted[kernels])),
            _measure(got[kernels], wanted[kernels]),
            own,
        )
        for kernels in family.kernels
    ]


def _choose(model: Any, kernels: str, family: Family) -> None:
    if len(family.kernels) > 1:
        model.set_experts_implementation(kernels)


def _measure(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    return max((one - other).abs().max().item() for one, other in zip(some, others, strict=True))
