"""Ranks that are only played, as `rank_loop` behaves towards others, and the time they live in."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from equipoise.elastic.channel import ChannelClosed, Message
from equipoise.elastic.launcher import RankSeat
from equipoise.elastic.membership import MembershipPlan
from equipoise.elastic.said import Heard, Said

if TYPE_CHECKING:
    from tests.faults.simulation import Game, Group, Preparation

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
        self.said, self.heard = Said(), Heard()
        self.knows = False
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
        self.is_alive, self.is_stopped, self.code = False, False, code
        if self.next is not None:
            self.next.miss(self)
        if self.channel is not None:
            self.channel.close()

    def hang(self) -> None:
        """Without a generation, for good: only a signal ends it."""
        self.is_stopped = self.was_hit = True
        self.group = None

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
            "said": self.said.count,
            "heard": self.heard.count,
        }
        record = game.controller._welcome(channel, hello)
        if record is None:
            self.end(1)
            return
        self.record, self.channel, self.knows = record, channel, False
        self.orphan_at = float("inf")

    def miss(self, channel: PlayedChannel) -> None:
        if self.channel is not channel or not self.is_alive:
            return
        self.channel = None
        self.orphan_at = self.game.world.now + self.game.spec.orphan_s
        self.game.world.after(0.2, self.call)

    def say(self, **message: Any) -> None:
        numbered = self.said.add(message)
        if self.channel is not None and self.knows:
            self.channel.say(numbered)

    def hear(self, channel: PlayedChannel, message: Message) -> None:
        if not self.is_alive or channel is not self.channel:
            return
        if message["do"] == "heard":
            self.said.confirm(message["heard"])
            for one in () if self.knows else self.said.unheard:
                channel.say(one)
            self.knows = True
        elif self.heard.is_new(message):
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
            if self.channel is not None and self.knows:
                steps = 0 if self.group is None else self.group.num_steps
                self.channel.say({"say": "beat", "steps": steps, "heard": self.heard.count})
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

    def do_back(self, message: Message) -> None:
        self.is_paused = message["paused"]

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
    def has_served(self) -> bool:
        """Whether the controller has heard that it serves: newcomers go with what they came to."""
        return self.record is not None and self.record.generation >= 0

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
