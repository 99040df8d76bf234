"""A service at one moment, as the controller knows it."""

from __future__ import annotations

from dataclasses import dataclass

from equipoise.elastic.changes import Changes
from equipoise.elastic.channel import Message
from equipoise.elastic.requests import RequestTable
from equipoise.elastic.roster import RankRecord, Roster
from equipoise.elastic.service import ModelFacts, ServiceStatus, ServiceTotals
from equipoise.elastic.spec import ServiceSpec


@dataclass
class Tally:
    """What ranks have done since the controller began. Owner: the controller's thread.

    Attributes:
        steps: forward passes of the ranks together.
        deaths: ranks that died.
        rebalances: plans that were carried out.
        moves: experts that travelled.
        balancedness: of the last rebalance; None before any.
    """

    steps: int = 0
    deaths: int = 0
    rebalances: int = 0
    moves: int = 0
    balancedness: float | None = None

    def note_beat(self, record: RankRecord, message: Message) -> None:
        """A rank gives a sign of life. Ranks step together: the first speaks for all."""
        steps = int(message.get("steps", 0))
        self.steps += steps - record.steps_seen if record.number == 0 else 0
        record.facts, record.steps_seen = message, steps

    def note_rebalance(self, message: Message) -> None:
        """A plan was carried out."""
        self.rebalances += 1
        self.moves += message["moves"]
        self.balancedness = message["balancedness"]


def describe_service(
    facts: ModelFacts,
    spec: ServiceSpec,
    changes: Changes,
    roster: Roster,
    requests: RequestTable,
    tally: Tally,
    closing: str | None,
    *,
    has_failed: bool,
) -> ServiceStatus:
    """Everything that its users see.

    Args:
        facts: of the model.
        spec: what was asked for.
        changes: of the membership.
        roster: its ranks.
        requests: its requests.
        tally: of what ranks have done.
        closing: why it takes no more; None while it does.
        has_failed: whether that is a failure.
    Collective: none; the controller's thread.
    """
    held = requests.held()
    serving = [one for one in roster.serving() if one.state == "serving"]
    is_ready = bool(serving) and not closing and not any(one.is_lost for one in serving)
    return ServiceStatus(
        model=facts,
        generation=changes.generation,
        phase="failed" if has_failed else changes.phase,
        reason=(closing or "") if has_failed else changes.reason,
        ready=is_ready,
        balancing=is_ready and changes.is_idle,
        balancedness=tally.balancedness,
        ranks=tuple(
            one.describe(held.get(one.name, 0), spec.max_batch_size, spec.silence_s)
            for one in roster
        ),
        queue_length=requests.num_waiting,
        queue_limit=spec.queue_limit,
        running=sum(held.values()),
        changes_waiting=changes.num_waiting,
        totals=ServiceTotals(
            **requests.counts(),
            steps=tally.steps,
            scalings=changes.num_scalings,
            recoveries=changes.num_recoveries,
            deaths=tally.deaths,
            rebalances=tally.rebalances,
            moves=tally.moves,
        ),
    )
