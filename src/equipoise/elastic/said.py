"""What two say to each other over channels that may drop: everything once, and in order.

A channel that drops takes along what was on its way. So what is said is numbered, and kept until
the other side has told that it came; over the next channel, what did not come is said again.
"""

from __future__ import annotations

import threading
from collections import deque

from equipoise.elastic.channel import Message


class Said:
    """What one side has said, and the other may not have heard. Any thread.

    Args:
        count: of what was said before, by whoever spoke in this one's place.
    """

    def __init__(self, count: int = 0) -> None:
        self._lock = threading.Lock()
        self._count = count
        self._unheard: deque[Message] = deque()

    @property
    def count(self) -> int:
        """Number of the last message."""
        with self._lock:
            return self._count

    @property
    def unheard(self) -> list[Message]:
        """What is to be said again over another channel, in order."""
        with self._lock:
            return list(self._unheard)

    def add(self, message: Message) -> Message:
        """The message with its number; kept until it is known to be heard."""
        with self._lock:
            self._count += 1
            numbered = {**message, "n": self._count}
            self._unheard.append(numbered)
            return numbered

    def confirm(self, count: int) -> None:
        """The other side has heard so many."""
        with self._lock:
            while self._unheard and self._unheard[0]["n"] <= count:
                self._unheard.popleft()


class Heard:
    """How much of what the other side says has come. Owner: one thread.

    Args:
        count: of what had come before, to whoever listened in this one's place.
    """

    def __init__(self, count: int = 0) -> None:
        self.count = count

    def is_new(self, message: Message) -> bool:
        """Whether a message has not come before; one without a number is said once only."""
        number = message.get("n")
        if number is None:
            return True
        if number <= self.count:
            return False
        assert number == self.count + 1, "what did not come is said again first"
        self.count = number
        return True
