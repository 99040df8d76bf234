"""How often recoveries, and replacements of ranks that died, are tried, and how soon again."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence

from equipoise.elastic.reach import STORE, choose_cut_off

logger = logging.getLogger(__name__)

STEADY_S = 10.0
"""A replacement that dies sooner counts as one that did not come."""

MOST_RECOVERIES = 3
"""Recoveries of the same ranks in a row, with no step served between them."""


class Recoveries:
    """Ends a service that cannot recover. Owner: the controller's thread."""

    def __init__(self) -> None:
        self._last: tuple[int, Sequence[str]] | None = None
        self._num_in_a_row = 0
        self._lacked: set[str] = set()

    def may_try(self, num_steps: int, survivors: Sequence[str]) -> bool:
        """Count a recovery; whether it may be tried.

        Args:
            num_steps: forward passes served so far.
            survivors: names; a recovery that another death ended leaves fewer, and that ends too.
        """
        facts = (num_steps, survivors)
        self._num_in_a_row = self._num_in_a_row + 1 if facts == self._last else 1
        self._last = facts
        return self._num_in_a_row <= MOST_RECOVERIES

    def choose_cut_off(self, missed: Mapping[str, Collection[str]]) -> list[str]:
        """Whom to go on without, after a recovery that came to nothing.

        Its connections to the store may have dropped just then: a rank is given up for that only
        if it does not reach the store twice in a row.

        Args:
            missed: by name, whom a participant does not reach; `STORE` for the store.
        """
        lacking = {name for name, others in missed.items() if STORE in others}
        again, self._lacked = lacking & self._lacked, lacking
        peers = {name: set(others) - {STORE} for name, others in missed.items()}
        return sorted(again) or choose_cut_off(peers)


class Respawn:
    """Doubles the wait after each replacement that failed, and ends after several in a row.

    Owner: the controller's thread.

    Args:
        most: failures in a row after which no more are tried.
        first_s: seconds between the first failure and the next try.
    """

    def __init__(self, most: int, first_s: float) -> None:
        self._most, self._first_s = most, first_s
        self._num_failed = 0
        self._next_at = self._failed_at = float("-inf")
        self._came: dict[str, float] = {}

    def may_try(self, now: float) -> bool:
        """Whether another replacement may be started; `now` as of time.monotonic."""
        if any(self._failed_at < came <= now - STEADY_S for came in self._came.values()):
            self.forget()
        return self._num_failed < self._most and now >= self._next_at

    def note_came(self, names: Iterable[str], now: float) -> None:
        """Replacements have come to serve."""
        self._came |= dict.fromkeys(names, now)

    def note_death(self, name: str, now: float) -> None:
        """A rank that served has died."""
        came = self._came.pop(name, None)
        if came is None:
            return
        if now - came < STEADY_S:
            self.note_failure(now)
        else:
            self.forget()

    def note_failure(self, now: float) -> None:
        """A replacement did not come to serve."""
        self._next_at = now + self._first_s * 2**self._num_failed
        self._num_failed += 1
        self._failed_at = now
        if self._num_failed == self._most:
            logger.error(
                "%d replacements in a row failed: ranks that died are not replaced any more, until "
                "a change of the ranks is asked for and done",
                self._most,
            )

    def forget(self) -> None:
        """What failed before is of no account any more."""
        self._num_failed = 0
        self._next_at = float("-inf")
