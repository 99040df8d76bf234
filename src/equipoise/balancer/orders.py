"""What any one rank may ask of all of them, to be done by all at one step."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from enum import IntEnum


class Order(IntEnum):
    """As ranks tell each other."""

    NONE = 0
    REARRANGE = 1
    PAUSE = 2
    RESUME = 3
    STOP = 4


class OrderBox:
    """Orders of this rank that the others have not heard of yet.

    Any thread puts them in; the worker alone takes them out.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[Order] = deque()

    def put(self, order: Order) -> None:
        """Behind those that wait. Collective: none; waits for nobody."""
        with self._lock:
            self._waiting.append(order)

    def first(self) -> Order:
        """W: the one that has waited longest, or NONE."""
        with self._lock:
            return self._waiting[0] if self._waiting else Order.NONE

    def take(self) -> None:
        """W: all ranks have heard of the first; forget it."""
        with self._lock:
            self._waiting.popleft()


def choose_order(told: Sequence[int]) -> tuple[int, Order]:
    """The order that all ranks follow of those that they told.

    Args:
        told: each rank's, or NONE.
    Returns:
        The first rank that has one, and its order; NONE if there is none.
    Collective: none; the same on every rank.
    """
    return next(((rank, Order(one)) for rank, one in enumerate(told) if one), (0, Order.NONE))
