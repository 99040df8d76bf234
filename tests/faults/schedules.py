"""Faults by a script that a seed makes: what happens to which rank, and when."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

Deed = Literal[
    "kill", "hang", "slow", "cut", "store", "mute", "block", "delay", "scale", "rebalance"
]
"""What is done.

kill: the rank's process ends at once. hang: it is stopped, and woken only after it was given up,
as a rank of a host that nobody can reach. slow: it is stopped for less than that. cut: its link to
the controller drops. store: its connections to the store drop. mute: for a while nothing of it
reaches the store. block: nor the controller, and no new connection either. delay: what it says and
hears takes longer for a while. scale, rebalance: what an operator asks for.
"""

Moment = Literal["now", "preparing", "committing", "retiring"]
"""When: at once, or as soon as a change of the ranks has come so far (or soon, if none does)."""

WEIGHTS: dict[Deed, int] = {
    "kill": 30,
    "hang": 6,
    "slow": 10,
    "cut": 12,
    "store": 10,
    "mute": 6,
    "block": 6,
    "delay": 10,
    "scale": 14,
    "rebalance": 6,
}


@dataclass(frozen=True)
class Act:
    """One thing that happens.

    Attributes:
        deed: what.
        after_s: behind the act before.
        moment: and not before a change has come so far.
        rank: place of its rank among those that live then, counted from 1: the first is spared, so
            that somebody is left; of `scale`, how many ranks there shall be.
        seconds: how long it lasts.
    """

    deed: Deed
    after_s: float
    moment: Moment
    rank: int
    seconds: float


@dataclass(frozen=True)
class Schedule:
    """What happens between two states of rest.

    Attributes:
        seed: that it was made from.
        num_ranks: that serve at its begin.
        spared: place of the rank that nothing is done to, rank 0 or another.
        acts: in order.
    """

    seed: int
    num_ranks: int
    spared: int
    acts: tuple[Act, ...]

    def __str__(self) -> str:
        lines = [f"schedule {self.seed}: {self.num_ranks} ranks, spared {self.spared}"]
        return "\n  ".join([*lines, *map(str, self.acts)])


def draw_schedule(seed: int, silence_s: float) -> Schedule:
    """The schedule of a seed, the same each time.

    Args:
        seed: any.
        silence_s: after which a rank is given up.
    """
    chance = random.Random(seed)
    acts = []
    for _ in range(chance.choice((1, 1, 2, 2, 3, 4))):
        (deed,) = chance.choices(list(WEIGHTS), list(WEIGHTS.values()))
        longest = {"block": 1.5 * silence_s, "mute": 1.5 * silence_s, "slow": 0.5 * silence_s}.get(
            deed, 1.0
        )
        acts.append(
            Act(
                deed,
                round(chance.choice((0.0, chance.uniform(0, 0.3), chance.uniform(0, 1.0))), 3),
                chance.choice(("now", "now", "preparing", "committing", "retiring")),
                chance.randint(2, 5) if deed == "scale" else chance.randint(1, 4),
                round(chance.uniform(0.05, longest), 3),
            )
        )
    return Schedule(seed, chance.randint(2, 5), chance.randint(0, 4), tuple(acts))
