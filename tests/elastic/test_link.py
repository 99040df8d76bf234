"""A rank's side of the channel, against a controller that is played."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from equipoise.elastic.channel import Channel, Listener, Message
from equipoise.elastic.launcher import RankSeat
from equipoise.elastic.link import ControllerLink
from equipoise.elastic.said import Heard, Said

WAIT_S = 20.0


class PlayedController:
    """Takes one rank's calls, one after the other."""

    def __init__(self) -> None:
        self.calls: queue.SimpleQueue[tuple[Channel, Message]] = queue.SimpleQueue()
        self.may_end = threading.Event()
        self.listener = Listener(("127.0.0.1", 0), "secret", self.greet, name="played")
        self.said, self.heard = Said(), Heard()

    def greet(self, channel: Channel, hello: Message) -> None:
        self.calls.put((channel, hello))
        self.may_end.wait(WAIT_S)

    def take_call(self) -> Channel:
        channel, hello = self.calls.get(timeout=WAIT_S)
        self.said.confirm(hello["heard"])
        channel.send({"do": "heard", "heard": self.heard.count})
        for message in self.said.unheard:
            channel.send(message)
        return channel

    def hear(self, channel: Channel) -> Any:
        """The next word that is new and no sign of life."""
        while True:
            message = channel.receive(WAIT_S)
            if self.heard.is_new(message) and message["say"] != "beat":
                return message["value"]


@contextmanager
def linked() -> Iterator[tuple[PlayedController, ControllerLink]]:
    controller = PlayedController()
    seat = RankSeat("rank-0", "it", "127.0.0.1", controller.listener.port, "secret", "cpu")
    link = ControllerLink(seat, lambda: {"say": "beat"})
    link.set_times(0.05, WAIT_S)
    try:
        yield controller, link
    finally:
        link.close()
        controller.may_end.set()
        controller.listener.close()


def test_what_a_dropped_channel_took_along_is_said_again_both_ways() -> None:
    with linked() as (controller, link):
        channel = controller.take_call()
        link.say({"say": "word", "value": 1})
        assert controller.hear(channel) == 1
        # Said into a channel that nobody reads any more.
        link.say({"say": "word", "value": 2})
        channel.send(controller.said.add({"do": "something"}))
        assert link.receive(WAIT_S) == {"do": "something", "n": 1}
        controller.said.add({"do": "what never left"})
        channel.close()
        link.say({"say": "word", "value": 3})
        channel = controller.take_call()
        assert [controller.hear(channel), controller.hear(channel)] == [2, 3]
        assert link.receive(WAIT_S) == {"do": "orphaned"}
        assert link.receive(WAIT_S) == {"do": "what never left", "n": 2}


def test_a_generation_that_is_over_is_told_of_at_once() -> None:
    over = threading.Event()
    with linked() as (controller, link):
        channel = controller.take_call()
        link.watch(3, over.set)
        channel.send(controller.said.add({"do": "over", "generation": 2, "reason": ""}))
        first = link.receive(WAIT_S)
        assert first is not None
        assert first["generation"] == 2
        assert not over.is_set()
        channel.send(controller.said.add({"do": "over", "generation": 3, "reason": ""}))
        assert over.wait(WAIT_S)


def test_a_rank_that_was_given_up_calls_nobody_again() -> None:
    with linked() as (controller, link):
        channel = controller.take_call()
        channel.send({"do": "given up"})
        assert link.receive(WAIT_S) == {"do": "given up"}
        channel.close()
        try:
            controller.calls.get(timeout=0.5)
        except queue.Empty:
            return
        raise AssertionError("it calls again")


def test_nothing_is_said_to_a_channel_before_what_came_earlier() -> None:
    with linked() as (controller, link):
        for _ in range(5):
            channel = controller.take_call()
            for number in range(20):
                link.say({"say": "word", "value": number})
            channel.close()
        channel = controller.take_call()
        heard = [controller.hear(channel) for _ in range(100)]
        assert heard == [number for _ in range(5) for number in range(20)]
