"""The controller itself, against ranks and a clock that are only played: thousands of schedules.

What decides is the real thing: `Controller`, its changes, roster and requests, the store's decision
on a change, and the ranks' `settle`. Ranks are played as `rank_loop` behaves towards others, with
messages on their way, steps that fail when a peer has gone or is cut off, and preparations that
take their time and may fail. Time is a number: nothing waits.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from torch.distributed import PrefixStore

from equipoise.elastic.controller import TICK_S, Controller
from equipoise.elastic.launcher import RankSeat
from equipoise.elastic.membership import MembershipPlan
from equipoise.elastic.orders import Change
from equipoise.elastic.reach import STORE
from equipoise.elastic.service import RequestFailed, ServiceRequest
from equipoise.elastic.spec import ServiceSpec
from equipoise.elastic.verdict import SWITCH, Word, settle
from equipoise.engine.requests import Delta, SamplingParams
from equipoise.errors import EquipoiseError
from tests.faults.played_ranks import STEP_S, PlayedRank, World

CLOCKED = ("controller", "changes", "roster", "change_plans")
"""Modules of elastic/ that look at the clock."""

HALF_MET = 0.1
"""How often a rank's exchange fails where all learn that the others switch."""
HUNG_LEAVING = 0.1
"""How often a rank that has left hangs on its way out."""


class Preparation:
    """The next generation of all its participants, as `NextGeneration` behaves."""

    def __init__(self, game: Game, plan: MembershipPlan) -> None:
        self.game, self.plan = game, plan
        self.store = PrefixStore(f"change{plan.generation}/", game.controller._store)
        self.here: dict[str, PlayedRank] = {}
        self.words: dict[str, Word] = dict.fromkeys(plan.participants, Word.OPEN)
        self.ready: set[str] = set()
        self.missed: dict[str, list[str]] = {}
        self.reason = ""
        deadlines = plan.deadlines
        self.until = game.world.now + deadlines.prepare_s
        self.end = self.until + deadlines.agree_s
        game.world.after(deadlines.prepare_s, self.run_late)

    def come(self, rank: PlayedRank) -> None:
        self.here[rank.name] = rank
        chance = self.game.world.chance
        # Not in recoveries: several that fail in a row end the service, as they should.
        if not self.plan.is_recovery and chance.random() < self.game.failure_rate:
            self.game.world.after(chance.uniform(0, 0.3), lambda: self.fail(rank, "a fault"))
        if set(self.here) == set(self.plan.participants):
            for one in self.here.values():
                self.game.world.after(
                    chance.uniform(0.02, 0.4), lambda one=one: self.get_ready(one)
                )

    def get_ready(self, rank: PlayedRank) -> None:
        if rank.next is not self or not rank.is_alive or rank.is_stopped:
            return
        if rank.lacks_store:
            self.missed[rank.name] = [STORE]
            self.learn(rank, Word.ABORT, "the store does not answer")
            return
        everybody = self.here.values()
        cut_off = [one.name for one in everybody if one.is_cut_off and len(everybody) > 1]
        if cut_off:
            self.missed |= {one.name: [c for c in cut_off if c != one.name] for one in everybody}
        if cut_off or not all(one.is_alive for one in everybody):
            self.fail(rank, "a participant does not answer")
            return
        if self.words[rank.name] is Word.OPEN:
            self.ready.add(rank.name)
            if self.ready == set(self.plan.participants):
                for one in self.here.values():
                    delay = self.game.world.chance.uniform(0.001, 0.02)
                    self.game.world.after(delay, lambda one=one: self.decide(one, SWITCH))

    def decide(self, rank: PlayedRank, proposal: str) -> None:
        """As a rank's building thread asks the store."""
        if rank.next is not self or not rank.is_alive:
            return
        if rank.is_stopped:
            self.game.world.after(0.1, lambda: self.decide(rank, proposal))
            return
        if rank.lacks_store:
            is_promised = rank.name in self.ready
            self.learn(rank, Word.LOST if is_promised else Word.ABORT, proposal)
            return
        stands = self.store.compare_set("decision", "", proposal).decode()
        self.learn(rank, Word.SWITCH if stands == SWITCH else Word.ABORT, stands)

    def learn(self, rank: PlayedRank, word: Word, reason: str) -> None:
        if self.words[rank.name] in (Word.OPEN, Word.LOST):
            self.words[rank.name] = word
            self.reason = reason
        if rank.group is None or rank.is_lost:
            self.go_alone(rank)

    def go_alone(self, rank: PlayedRank) -> None:
        """Without steps to serve, a rank does what it knows at once."""
        word = self.words[rank.name]
        if word is Word.SWITCH:
            self.switch(rank)
        elif word is Word.ABORT:
            rank.forget_next(self.reason)

    def fail(self, rank: PlayedRank, why: str) -> None:
        self.decide(rank, f"abort: {rank.name}: {why}")

    def abort(self, rank: PlayedRank, reason: str) -> None:
        delay = self.game.world.chance.uniform(0.001, 0.05)
        self.game.world.after(delay, lambda: self.decide(rank, f"abort: {reason}"))

    def miss(self, rank: PlayedRank) -> None:
        """It has died: whoever exchanges something with it hears of that."""
        for other in self.here.values():
            if other is not rank:
                delay = self.game.world.chance.uniform(0.001, 0.2)
                self.game.world.after(delay, lambda one=other: self.fail(one, "a peer has gone"))

    def leave(self, rank: PlayedRank, why: str) -> None:
        """It does not switch, whatever the others do."""
        if not rank.lacks_store and rank.is_alive:
            self.store.compare_set("decision", "", f"abort: {why}")

    def run_late(self) -> None:
        for rank in list(self.here.values()):
            if rank.next is self and self.words[rank.name] is Word.OPEN:
                self.fail(rank, "not in time")

    def switch(self, rank: PlayedRank) -> None:
        names = tuple(member.name for member in self.plan.members)
        rank.next = None
        if rank.name not in names:
            rank.say(say="left")
            rank.requests.clear()
            if self.game.world.chance.random() < HUNG_LEAVING:
                rank.hang()
            else:
                rank.end(0)
            return
        group = self.game.groups.get(self.plan.generation)
        if group is None:
            group = self.game.groups[self.plan.generation] = Group(
                self.game, self.plan.generation, names
            )
        was_member = rank.group is not None
        rank.serve(group, "switched")
        group.come(rank)
        if was_member:
            delay = self.game.world.chance.uniform(0.01, 0.3)
            self.game.world.after(delay, lambda: rank.say(say="retired", pause_s=0.0))


class Group:
    """Ranks that step together, or fail together."""

    def __init__(self, game: Game, generation: int, names: tuple[str, ...]) -> None:
        self.game, self.generation, self.names = game, generation, names
        self.members: dict[str, PlayedRank] = {}
        self.num_steps = 0
        self.is_broken = False
        self.stalled_at: float | None = None
        game.world.after(game.spec.timeout_s, self.miss)

    def come(self, rank: PlayedRank) -> None:
        self.members[rank.name] = rank
        if len(self.members) == len(self.names):
            self.game.world.after(STEP_S, self.step)
        elif self.is_broken:
            self.fail("a member has gone")

    def miss(self) -> None:
        if len(self.members) < len(self.names):
            self.fail("a member did not come")

    def fail(self, reason: str) -> None:
        self.is_broken = True
        for rank in self.members.values():
            if rank.group is self and not rank.is_stopped:
                delay = self.game.world.chance.uniform(0.001, 0.05)
                self.game.world.after(delay, lambda rank=rank: rank.lose(reason))
        if any(rank.group is self and rank.is_stopped for rank in self.members.values()):
            self.game.world.after(0.2, lambda: self.fail(reason))

    def step(self) -> None:
        game, here = self.game, [rank for rank in self.members.values() if rank.group is self]
        if not here:
            return
        if self.is_broken or len(here) < len(self.names) or not all(r.is_alive for r in here):
            self.fail("rank died")
            return
        if any(rank.is_stopped or (rank.is_cut_off and len(here) > 1) for rank in here):
            self.stalled_at = self.stalled_at or game.world.now
            if game.world.now - self.stalled_at > game.spec.timeout_s:
                self.fail("a rank did not answer in time")
                return
            game.world.after(0.05, self.step)
            return
        self.stalled_at = None
        for rank in here:
            rank.obey()
        if not all(rank.is_alive and not rank.is_lost for rank in here):
            self.fail("rank left")
            return
        self.meet(here)
        game.world.after(STEP_S, self.step)

    def meet(self, here: list[PlayedRank]) -> None:
        game = self.game
        words = [Word.OPEN if r.next is None else self.find_word(r) for r in here]
        if any(rank.stops for rank in here):
            for rank in here:
                rank.end(0)
            return
        verdict = settle(words)
        if verdict is Word.SWITCH:
            for rank in here:
                if len(here) > 1 and game.world.chance.random() < HALF_MET:
                    # The others' exchange went well, and this one's did not.
                    rank.lose("rank died")
                elif rank.next is not None and rank.name in rank.next.ready:
                    rank.next.switch(rank)
                else:
                    rank.lose("cannot switch")
            return
        if verdict is Word.ABORT:
            for rank in here:
                rank.forget_next("called off" if rank.next is None else rank.next.reason)
        self.num_steps += 1
        if self.generation < game.newest:
            game.wrong.append(f"generation {self.generation} steps after {game.newest} has")
        game.newest = self.generation
        is_paused = any(rank.is_paused for rank in here)
        for rank in here:
            if rank.is_asked and is_paused:
                rank.is_asked = False
                rank.say(
                    say="holding", serving=self.game.describe(rank), fingerprints=[self.generation]
                )
            self.game.produce(rank)

    def find_word(self, rank: PlayedRank) -> Word:
        assert rank.next is not None
        word = rank.next.words[rank.name]
        if word is Word.OPEN and self.game.world.now > rank.next.end:
            return Word.LOST if rank.name in rank.next.ready else Word.ABORT
        return word


@dataclass
class Game:
    """One controller over played ranks."""

    world: World
    spec: ServiceSpec
    failure_rate: float
    controller: Controller = field(init=False)
    ranks: list[PlayedRank] = field(default_factory=list)
    groups: dict[int, Group] = field(default_factory=dict)
    preparations: dict[int, Preparation] = field(default_factory=dict)
    pids: Any = field(default_factory=lambda: itertools.count(1))
    wrong: list[str] = field(default_factory=list)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    num_done: int = 0
    newest: int = -1
    has_cut_off: bool = False
    held_until: float = 0.0

    def open(self) -> None:
        launcher = SimpleNamespace(
            host="played",
            find_device=lambda taken: "cpu",
            start=self.start,
            close=lambda: None,
        )
        self.controller = Controller(self.spec, launcher)
        self.controller._changes.begin()
        self.tick()

    def start(self, seat: RankSeat) -> PlayedRank:
        rank = PlayedRank(self, seat)
        self.ranks.append(rank)
        return rank

    def begin(self, generation: int, names: list[str]) -> None:
        group = self.groups.get(generation)
        if group is None:
            self.groups[generation] = group = Group(self, generation, tuple(names))
            for name in names:
                rank = next(r for r in reversed(self.ranks) if r.name == name)
                rank.serve(group, "serving")
                group.come(rank)

    def prepare(self, plan: MembershipPlan) -> Preparation:
        return self.preparations.setdefault(plan.generation, Preparation(self, plan))

    def describe(self, rank: PlayedRank) -> Any:
        """What the rank holds: all 8 experts of 1 layer, so that any ranks will do."""
        assert rank.group is not None
        return {
            "generation": rank.group.generation,
            "shapes": [{"num_experts": 8, "expert_bytes": [64]}],
            "shared_bytes": 64,
            "held": {rank.name: [[list(range(8))]]},
            "copies": {rank.name: []},
        }

    def produce(self, rank: PlayedRank) -> None:
        deltas = []
        for key, state in list(rank.requests.items()):
            attempt, position, sampling = state
            state[1] += 1
            most = sampling["max_new_tokens"]
            ends = "length" if position + 1 >= most else None
            deltas.append([key, attempt, position, [find_token(key, position)], ends])
            if ends:
                del rank.requests[key]
        if deltas:
            assert rank.group is not None
            rank.say(say="deltas", generation=rank.group.generation, deltas=deltas)

    def tick(self) -> None:
        """As the controller's thread goes round."""
        if self.world.now < self.held_until:
            self.world.after(self.held_until - self.world.now, self.tick)
            return
        controller = self.controller
        while not controller._events.empty():
            controller._events.get()()
        controller._tick()
        controller._changes.start_next()
        controller._assign()
        self.world.after(TICK_S, self.tick)

    def submit(self) -> None:
        key = f"r{len(self.tokens)}"
        self.tokens[key] = []
        most = self.world.chance.randint(1, 30)
        request = ServiceRequest(key, (3, 4), SamplingParams(max_new_tokens=most, ignore_end=True))
        self.controller.submit(request, self.take)

    def take(self, event: Delta | RequestFailed) -> None:
        if isinstance(event, RequestFailed):
            self.wrong.append(f"{event.request_id} failed: {event.reason}")
            return
        got = self.tokens[event.request_id]
        if event.position != len(got):
            self.wrong.append(f"{event.request_id}: {event} behind {len(got)} tokens")
        got.extend(event.tokens)
        right = [find_token(event.request_id, place) for place in range(len(got))]
        if got != right:
            self.wrong.append(f"{event.request_id}: {got} where {right} is right")
        if event.finish_reason is not None:
            self.num_done += 1
            # Not from within the table's own call.
            self.world.after(0.001, self.submit)

    def is_at_rest(self) -> bool:
        changes = self.controller._changes
        serving = self.controller._roster.serving()
        return (
            changes.is_idle
            and not changes.num_waiting
            and len(serving) == changes._wanted
            and not any(one.is_lost or one.channel is None for one in serving)
        )

    def scale(self, to: int) -> None:
        try:
            self.controller._changes.ask(Change("scale", to=to), "queue")
        except EquipoiseError:
            return

    def find_wronged(self) -> list[str]:
        """Ranks that served, had nothing done to them, and were ended nevertheless."""
        return [
            f"{rank.name} was well, and was ended: {rank.record.detail}"
            for rank in self.ranks
            if rank.code == -9 and rank.has_served and not rank.was_hit
        ]

    def close(self) -> None:
        controller = self.controller
        controller._is_over.set()
        controller._listener.close()


def find_token(key: str, position: int) -> int:
    """Of a request; which rank says it makes no difference."""
    return (int(key[1:]) * 31 + position * 7) % 250
