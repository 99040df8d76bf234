"""The controller itself, against ranks and a clock that are only played: thousands of schedules.

What decides is the real thing: `Controller`, its changes, roster and requests, the store's decision
on a change, and the ranks' `settle`. Ranks are played as `rank_loop` behaves towards others, with
messages on their way, steps that fail when a peer has gone or is cut off, and preparations that
take their time and may fail. Time is a number: nothing waits.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from torch.distributed import PrefixStore

from equipoise.elastic.channel import ChannelClosed, Message
from equipoise.elastic.controller import TICK_S, Controller
from equipoise.elastic.launcher import RankSeat
from equipoise.elastic.membership import MembershipPlan
from equipoise.elastic.orders import Change
from equipoise.elastic.service import RequestFailed, ServiceRequest
from equipoise.elastic.spec import ServiceSpec
from equipoise.elastic.verdict import SWITCH, Word, settle
from equipoise.engine.requests import Delta, SamplingParams
from equipoise.errors import EquipoiseError

CLOCKED = ("controller", "changes", "roster", "change_plans")
"""Modules of elastic/ that look at the clock."""
STEP_S = 0.01
LISTEN_S = 0.06
"""Between two looks of a rank that does not step, with what they take."""


class World:
    """Time, and what happens in it, in order."""

    def __init__(self, seed: int) -> None:
        self.now = 1000.0
        self.chance = random.Random(seed)
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    def monotonic(self) -> float:
        return self.now

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._due, (self.now + seconds, next(self._count), act))

    def go_on(self) -> None:
        self.now, _, act = heapq.heappop(self._due)
        act()


class PlayedChannel:
    """Frames on their way between the controller and a rank, in order; a cut loses them."""

    def __init__(self, world: World, rank: PlayedRank) -> None:
        self._world, self._rank = world, rank
        self.peer = rank.name
        self.is_closed = False
        self._there_at = self._here_at = 0.0

    def send(self, message: Message, *, timeout_s: float = 0.0) -> None:
        if self.is_closed:
            raise ChannelClosed("it was closed")
        self._there_at = self._arrive(self._there_at, lambda: self._rank.hear(self, message))

    def say(self, message: Message) -> None:
        record = self._rank.record
        controller = self._rank.game.controller
        self._here_at = self._arrive(self._here_at, lambda: controller._hear(record, message))

    def close(self) -> None:
        if self.is_closed:
            return
        self.is_closed = True
        game, rank = self._rank.game, self._rank
        game.world.after(0.001, lambda: rank.miss(self))
        if rank.record is not None:
            game.world.after(0.001, lambda: game.controller._miss(rank.record, self))

    def _arrive(self, before: float, act: Callable[[], None]) -> float:
        world = self._world
        at = max(before, world.now + world.chance.uniform(0.0001, 0.003), self._rank.held_until)

        def deliver() -> None:
            if not self.is_closed:
                act()

        world.after(at - world.now, deliver)
        return at


class PlayedRank:
    """A rank as others see it. Also its own handle, for the launcher."""

    def __init__(self, game: Game, seat: RankSeat) -> None:
        self.game, self.seat, self.name = game, seat, seat.name
        self.pid = next(game.pids)
        self.code: int | None = None
        self.detail = ""
        self.record: Any = None
        self.is_alive = True
        self.is_stopped = self.is_far = self.is_cut_off = self.lacks_store = False
        self.was_hit = False
        self.held_until = 0.0
        self.channel: PlayedChannel | None = None
        self.outbox: deque[Message] = deque()
        self.inbox: deque[Message] = deque()
        self.group: Group | None = None
        self.is_lost = False
        self.lost_by = float("inf")
        self.orphan_at = float("inf")
        self.next: Preparation | None = None
        self.requests: dict[str, list[Any]] = {}
        self.is_paused = self.stops = self.is_asked = False
        game.world.after(game.world.chance.uniform(0.05, 0.5), self.call)

    # What the launcher's handle is asked for.

    def stop(self, *, kill: bool = False) -> None:
        if not self.is_far:
            self.end(-9 if kill else -15)

    def wait(self, timeout_s: float) -> int | None:
        return self.exit_code

    @property
    def exit_code(self) -> int | None:
        return None if self.is_far else self.code

    # What the process does.

    def end(self, code: int) -> None:
        if not self.is_alive:
            return
        self.is_alive, self.code = False, code
        if self.next is not None:
            self.next.miss(self)
        if self.channel is not None:
            self.channel.close()

    def call(self) -> None:
        game = self.game
        if not self.is_alive or self.channel is not None:
            return
        if self.held_until > game.world.now or self.is_stopped:
            game.world.after(0.2, self.call)
            return
        channel = PlayedChannel(game.world, self)
        hello = {
            "name": self.name,
            "incarnation": self.seat.incarnation,
            "pid": self.pid,
            "host": "h",
            "node": "h",
            "address": "127.0.0.1",
            "device": "cpu",
            "met": "",
        }
        record = game.controller._welcome(channel, hello)
        if record is None:
            self.end(1)
            return
        self.record, self.channel = record, channel
        self.orphan_at = float("inf")
        while self.outbox:
            channel.say(self.outbox.popleft())

    def miss(self, channel: PlayedChannel) -> None:
        if self.channel is not channel or not self.is_alive:
            return
        self.channel = None
        self.orphan_at = self.game.world.now + self.game.spec.orphan_s
        self.game.world.after(0.2, self.call)

    def say(self, **message: Any) -> None:
        if self.channel is None:
            self.outbox.append(message)
        else:
            self.channel.say(message)

    def hear(self, channel: PlayedChannel, message: Message) -> None:
        if self.is_alive and channel is self.channel:
            self.inbox.append(message)
            if self.group is None or self.is_lost:
                # It looks now and then.
                world = self.game.world
                world.after(world.chance.uniform(0.001, LISTEN_S), self.stand_by)

    def stand_by(self) -> None:
        """Without a generation to serve in."""
        if self.is_alive and not self.is_stopped and (self.group is None or self.is_lost):
            self.obey()

    def obey(self) -> None:
        while self.inbox and self.is_alive:
            message = self.inbox.popleft()
            getattr(self, "do_" + message["do"].replace(" ", "_"))(message)
        if self.is_alive and self.stops and (self.group is None or self.is_lost):
            self.end(0)

    def beat(self) -> None:
        game = self.game
        if not self.is_alive:
            return
        if not self.is_stopped:
            if self.channel is not None:
                self.say(say="beat", steps=0 if self.group is None else self.group.num_steps)
            elif game.world.now > self.orphan_at:
                self.end(1)
            if game.world.now > self.lost_by:
                self.end(1)
        game.world.after(game.spec.beat_s, self.beat)

    def lose(self, reason: str) -> None:
        if not self.is_alive or self.is_lost or self.group is None:
            return
        if self.next is not None:
            self.next.leave(self, "its step has failed")
            self.next = None
        self.is_lost = True
        spec = self.game.spec
        self.lost_by = self.game.world.now + spec.change_s + 2 * spec.timeout_s
        self.group.is_broken = True
        self.say(
            say="lost",
            generation=self.group.generation,
            reason=reason,
            peer=None,
            serving=self.game.describe(self),
        )
        self.game.world.after(0.001, self.stand_by)

    def serve(self, group: Group, said: str) -> None:
        self.group, self.is_lost, self.lost_by, self.next = group, False, float("inf"), None
        self.say(
            say=said,
            generation=group.generation,
            number=group.names.index(self.name),
            placements=[],
        )

    # Orders.

    def do_welcome(self, message: Message) -> None:
        self.beat()
        self.game.world.after(
            self.game.world.chance.uniform(0.1, 1.0), lambda: self.say(say="warm")
        )

    def do_begin(self, message: Message) -> None:
        self.game.begin(message["generation"], message["names"])

    def do_submit(self, message: Message) -> None:
        for one in message["requests"]:
            self.requests[one["id"]] = [one["attempt"], len(one["generated"]), one["sampling"]]

    def do_cancel(self, message: Message) -> None:
        for key in message["ids"]:
            self.requests.pop(key, None)

    def do_evict(self, message: Message) -> None:
        self.requests.clear()

    def do_pause(self, message: Message) -> None:
        self.is_paused = message["paused"]

    def do_rebalance(self, message: Message) -> None:
        pass

    def do_wake(self, message: Message) -> None:
        pass

    def do_describe(self, message: Message) -> None:
        self.is_asked = True

    def do_prepare(self, message: Message) -> None:
        if self.next is not None:
            self.next.leave(self, "another change has taken its place")
        self.next = self.game.prepare(MembershipPlan.from_json(message["plan"]))
        self.next.come(self)

    def do_abort(self, message: Message) -> None:
        if self.next is not None:
            self.next.abort(self, message["reason"])

    def do_over(self, message: Message) -> None:
        if self.group is not None and self.group.generation == message["generation"]:
            self.lose(message["reason"])

    def do_given_up(self, message: Message) -> None:
        self.end(1)

    def do_stop(self, message: Message) -> None:
        self.stops = True

    @property
    def is_well(self) -> bool:
        """Whether it serves, and nothing was ever done to it."""
        is_leaving = self.record is not None and self.record.state != "serving"
        return self.is_alive and self.group is not None and not self.was_hit and not is_leaving

    def wake(self) -> None:
        """Whatever kept it from others is over."""
        self.is_stopped = self.is_far = self.is_cut_off = self.lacks_store = False
        self.game.world.after(0.001, self.stand_by)

    def forget_next(self, reason: str) -> None:
        if self.next is None:
            return
        gone, self.next = self.next, None
        generation = gone.plan.generation
        self.say(say="aborted", generation=generation, reason=reason, missed=gone.missed)
        if self.group is None:
            self.end(0)


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
        everybody = self.here.values()
        cut_off = [one.name for one in everybody if one.is_cut_off and len(everybody) > 1]
        if cut_off:
            self.missed = {one.name: [c for c in cut_off if c != one.name] for one in everybody}
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
                if rank.next is not None and rank.name in rank.next.ready:
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
            if rank.code == -9 and rank.group is not None and not rank.was_hit
        ]

    def close(self) -> None:
        controller = self.controller
        controller._is_over.set()
        controller._listener.close()


def find_token(key: str, position: int) -> int:
    """Of a request; which rank says it makes no difference."""
    return (int(key[1:]) * 31 + position * 7) % 250
