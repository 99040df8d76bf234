"""What the participants of a change tell each other through the store."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property

from torch.distributed.distributed_c10d import PrefixStore, Store

from equipoise.comm.store_client import clone_store
from equipoise.elastic.verdict import ABORT, SWITCH
from equipoise.errors import MembershipError

_SLICE_S = 0.2
"""How long a wait goes on before it looks whether the change was called off."""
_DECISION = "decision"


class CalledOff(MembershipError):  # noqa: N818 - says what happened
    """The change was called off; the message says why."""


class StoreLost(MembershipError):  # noqa: N818 - says what happened
    """The store does not answer any more."""


class ChangeStore:
    """One change's keys, by a client of its own. Owner: one thread, which makes all calls.

    The client is made by the first of them. Where the store's process is gone, a call fails at
    once; where it is stopped or cut off, it may block for longer than it should: whoever waits for
    this thread has a deadline of its own.

    Args:
        store: the controller's.
        generation: that the change leads to.
    """

    def __init__(self, store: Store, generation: int) -> None:
        self._origin, self._generation = store, generation
        self._is_called_off = threading.Event()
        self._why = ""
        self._lock = threading.Lock()
        self._asked_at: float | None = None

    @property
    def waited_s(self) -> float:
        """How long the store has been asked something that it has not answered. Any thread."""
        with self._lock:
            return 0.0 if self._asked_at is None else time.monotonic() - self._asked_at

    @cached_property
    def _store(self) -> Store:
        return _prefix(clone_store(self._origin), self._generation)

    def make_client(self) -> Store:
        """Another client of the controller's store, without the change's prefix.

        Raises: StoreLost.
        """
        with self._asking():
            return clone_store(self._origin)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        with self._lock:
            self._asked_at = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            raise StoreLost(f"the store does not answer: {error}") from error
        finally:
            with self._lock:
                self._asked_at = None

    def call_off(self, why: str) -> None:
        """Any thread: end waits, now and later."""
        self._why = self._why or why
        self._is_called_off.set()

    def check(self) -> None:
        """Raise CalledOff if this rank or another has called the change off."""
        if self._is_called_off.is_set():
            raise CalledOff(self._why)
        with self._asking():
            stands = self._store.get(_DECISION).decode() if self._store.check([_DECISION]) else ""
        if stands.startswith(ABORT):
            raise CalledOff(stands.removeprefix(f"{ABORT}: "))

    def tell(self, key: str, value: str) -> None:
        """Put a value under a key. Raises: StoreLost."""
        with self._asking():
            self._store.set(key, value)

    def hear(self, key: str, who: str, deadline: float) -> str:
        """Wait for a value.

        Args:
            key: its.
            who: puts it there, for errors.
            deadline: on the clock of time.monotonic.
        Raises: CalledOff; StoreLost; MembershipError that names who did not come.
        """
        while True:
            self.check()
            started = time.monotonic()
            seconds = max(0.001, min(_SLICE_S, deadline - started))
            try:
                self._store.wait([key], timedelta(seconds=seconds))
                return str(self._store.get(key).decode())
            except RuntimeError as error:
                now = time.monotonic()
                if now >= deadline:
                    raise MembershipError(f"{who} did not get so far in time ({key})") from error
                if now - started < seconds / 2:
                    raise StoreLost(f"the store does not answer: {error}") from error

    def hear_all(self, prefix: str, names: Iterable[str], deadline: float) -> dict[str, str]:
        """Wait for `prefix/name` of every name; raises as `hear`."""
        return {name: self.hear(f"{prefix}/{name}", name, deadline) for name in names}

    def decide(self, proposal: str) -> str:
        """Settle the change: the first proposal to arrive stands, for all. Raises: StoreLost."""
        with self._asking():
            return str(self._store.compare_set(_DECISION, "", proposal).decode())


def call_off(store: Store, generation: int, reason: str) -> bool:
    """Call a change off, for all its participants; any process that reaches the store may.

    Args:
        store: the controller's; the call may block for as long as its client does.
        generation: that the change leads to.
        reason: one line.
    Returns:
        Whether it is off; if not, the next generation had been decided on before.
    Collective: none.
    """
    stands = _prefix(store, generation).compare_set(_DECISION, "", say_abort(reason))
    return bool(stands.decode() != SWITCH)


def read_decision(store: Store, generation: int) -> str | None:
    """What stands: None, "switch", or "abort: " and the reason. Collective: none."""
    prefixed = _prefix(store, generation)
    return prefixed.get(_DECISION).decode() if prefixed.check([_DECISION]) else None


def say_abort(reason: str) -> str:
    """The word that calls a change off."""
    return f"{ABORT}: {' '.join(reason.split())}"


def _prefix(store: Store, generation: int) -> Store:
    return PrefixStore(f"change{generation}/", store)
