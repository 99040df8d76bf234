"""What a rank serves in, and what it says of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from equipoise.balancer import RebalanceOutcome
from equipoise.comm.groups import RankGroup
from equipoise.elastic.channel import Message
from equipoise.elastic.membership import Serving
from equipoise.elastic.planning import describe
from equipoise.elastic.verdict import Word
from equipoise.models.parallel import ParallelModel


@dataclass(frozen=True)
class Meeting:
    """What all ranks do next.

    Attributes:
        works: whether any has a request, so that all run a forward pass.
        stops: whether any was told to stop, so that all do.
        is_paused: whether any was told that no rebalance shall begin.
        num_rebalances: most that any was asked for.
        scores: whether all have texts to be scored.
        word: what becomes of the next generation.
    """

    works: bool
    stops: bool
    is_paused: bool
    num_rebalances: int
    scores: bool
    word: Word


@dataclass(frozen=True)
class Duty:
    """The generation that a rank serves in.

    Attributes:
        generation: its number.
        names: of its ranks, by number.
        parallel: the model with its groups, maps and balancer.
    """

    generation: int
    names: tuple[str, ...]
    parallel: ParallelModel

    @property
    def group(self) -> RankGroup:
        """The ranks of the generation."""
        return self.parallel.state.group

    @property
    def number(self) -> int:
        """Of this rank in it."""
        return self.group.rank

    def describe(self) -> Serving:
        """What this rank's slots hold."""
        return describe(self.parallel, self.names, only=self.names[self.number])

    def fingerprint(self) -> list[str]:
        """Of the placements that this rank goes by."""
        return [one.maps.placement.fingerprint() for one in self.parallel.spread.sets]

    def to_json(self) -> dict[str, Any]:
        """Which generation it is, and where its experts are."""
        return {
            "generation": self.generation,
            "number": self.number,
            "names": list(self.names),
            "placements": [
                json.loads(one.maps.placement.to_json()) for one in self.parallel.spread.sets
            ],
        }

    def tell_outcome(self, outcome: RebalanceOutcome) -> Message:
        """What a rebalance came to."""
        return {
            "say": "rebalanced",
            "moves": int(outcome.moves),
            "balancedness": float(outcome.balancedness_after.mean()),
            **self.to_json(),
        }
