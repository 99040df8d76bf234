"""Changes of the membership that are asked for, and how they are checked."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from equipoise.elastic.channel import Message
from equipoise.elastic.membership import MembershipPlan
from equipoise.elastic.roster import RankRecord
from equipoise.elastic.service import ScaleReport
from equipoise.errors import ConfigError

Stage = Literal["launching", "describing", "preparing", "aborting", "registering", "retiring"]

STAGE_ENDS: Mapping[Stage, tuple[str, ...]] = MappingProxyType(
    {
        "launching": ("warm",),
        "describing": ("holding",),
        "preparing": ("serving", "switched", "left", "aborted"),
        "aborting": ("aborted", "switched", "lost"),
        "registering": ("lost",),
        "retiring": ("retired",),
    }
)
"""Which words end a rank's part in each stage."""


@dataclass(frozen=True)
class Hands:
    """What a change needs done by the controller.

    Attributes:
        launch: start a rank of that name.
        dismiss: have a rank serve no more, and take its requests back, to be run elsewhere.
        call_off: have the store call off the change to a generation, for a reason; False if the
            change stands.
        give_up: end the service, with the reason.
        bury: have done with a rank, and say why.
        count_steps: forward passes that ranks have served so far.
    """

    launch: Callable[[str], RankRecord]
    dismiss: Callable[[str], None]
    call_off: Callable[[int, str], bool]
    give_up: Callable[[str], None]
    bury: Callable[[RankRecord, str], None]
    count_steps: Callable[[], int]


@dataclass
class Change:
    """A change of the membership, from the asking to its end. Owner: the controller's thread.

    Attributes:
        kind: `begin` makes the first generation, `scale` was asked for, `recover` follows deaths;
            `adopt` takes ranks of another controller over, `renew` has them meet through the store
            of this one.
        to: ranks that there shall be, as asked for.
        remove: names that shall leave, as asked for.
        dry_run: whether it is only rehearsed.
        is_respawn: whether it replaces ranks that died, without having been asked for.
        answer: gets the report, or the error.
        stage: how far it is.
        joining: names of newcomers.
        leaving: names of leavers.
        awaited: names of ranks whose word is waited for.
        deadline: of the stage, monotonic.
        plan: what ranks prepare.
        why: it was called off, or is needed.
        warm_at: when its newcomers were there, monotonic; decides what a change itself takes.
        decided_at: when the first rank had switched.
        full_at: when all members had.
        switched: names of ranks that serve in the next generation.
        aborted: names of ranks that have called it off.
        missed: by name, whom a participant does not reach.
    """

    kind: Literal["adopt", "begin", "recover", "renew", "scale"]
    to: int | None = None
    remove: tuple[str, ...] = ()
    dry_run: bool = False
    is_respawn: bool = False
    answer: Future[ScaleReport] = field(default_factory=Future)
    stage: Stage = "launching"
    joining: list[str] = field(default_factory=list)
    leaving: list[str] = field(default_factory=list)
    awaited: set[str] = field(default_factory=set)
    deadline: float = float("inf")
    plan: MembershipPlan | None = None
    why: str = ""
    warm_at: float = field(default_factory=time.monotonic)
    decided_at: float | None = None
    full_at: float | None = None
    switched: set[str] = field(default_factory=set)
    aborted: set[str] = field(default_factory=set)
    missed: dict[str, list[str]] = field(default_factory=dict)

    def is_other(self, message: Message) -> bool:
        """Whether a rank speaks of another generation than this change leads to."""
        wanted = None if self.plan is None else self.plan.generation
        return wanted is not None and message.get("generation", wanted) != wanted

    def has_stood(self, serving: Collection[str]) -> bool:
        """Whether it is done, though a death has ended what it led to.

        Args:
            serving: names of ranks that are to go on together.
        """
        has_switched = self.stage == "retiring" or (self.kind == "scale" and bool(self.switched))
        # One that was to leave may have lost its last step before it heard that all had switched.
        return has_switched and not set(self.leaving) & set(serving)

    def __str__(self) -> str:
        if self.kind == "begin":
            return "starting the first generation"
        if self.kind == "recover":
            return f"recovering: {self.why}"
        if self.kind == "adopt":
            return "taking over the ranks of a controller that has gone"
        if self.kind == "renew":
            return "its controller was restarted: ranks go over to the new one's store"
        parts = []
        if self.joining:
            parts.append(f"{', '.join(self.joining)} coming")
        if self.leaving:
            parts.append(f"{', '.join(self.leaving)} leaving")
        return "; ".join(parts)


def settle_names(
    change: Change, serving: Sequence[str], new_names: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Who comes and who goes, of a change that was asked for.

    Args:
        change: what was asked for.
        serving: names of ranks that serve, in the order of their numbers.
        new_names: for as many newcomers as may be.
    Returns:
        Names of newcomers and of leavers.
    Raises: ConfigError if it cannot be asked for, saying what could.
    """
    if change.remove:
        unknown = [name for name in change.remove if name not in serving]
        if unknown:
            raise ConfigError(
                f"{', '.join(unknown)} {'does' if len(unknown) == 1 else 'do'} not serve: there "
                f"are {', '.join(serving)}"
            )
        leaving = list(dict.fromkeys(change.remove))
        if len(leaving) == len(serving):
            raise ConfigError("all ranks would leave: at least one must stay")
        return [], leaving
    assert change.to is not None
    more = change.to - len(serving)
    return list(new_names[: max(0, more)]), list(serving[change.to :]) if more < 0 else []
