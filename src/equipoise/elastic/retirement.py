"""A generation that serves no more is closed, in a thread of its own."""

from __future__ import annotations

import contextlib
import logging
import threading
import time

from equipoise.elastic.bridge import Bridge
from equipoise.elastic.change_store import CalledOff, ChangeStore
from equipoise.elastic.membership import MembershipPlan
from equipoise.errors import MembershipError
from equipoise.models.parallel import ParallelModel

logger = logging.getLogger(__name__)

FIRST_STEP_S = 1.0
"""Longest that closing waits for the first step behind the switch, which it would hold up."""


class Retirement:
    """Closes a generation's groups, communicators and dispatchers once nobody uses them.

    Where ranks have switched, it waits until all have, so that nobody loses a last message; where
    ranks have died, it waits for nobody. Nothing is closed beside the first step behind a switch:
    that is part of the pause. What does not close in time is left to this thread.

    Args:
        parallel: of the generation that ends.
        plan: of the change that ended it.
        store: the change's, which this thread owns from now on.
        name: of this rank.
        bridge: wires of the change, if they are still open.
    """

    def __init__(
        self,
        parallel: ParallelModel,
        plan: MembershipPlan,
        store: ChangeStore,
        name: str,
        bridge: Bridge | None = None,
    ) -> None:
        self._parallel: ParallelModel | None = parallel
        self._bridge = bridge
        self._plan, self._store, self._name = plan, store, name
        self._deadline = time.monotonic() + plan.deadlines.retire_s
        self._may_begin, self._is_done = threading.Event(), threading.Event()
        threading.Thread(target=self._run, name="equipoise-retire", daemon=True).start()

    @property
    def is_done(self) -> bool:
        """Whether nothing of the generation is left on this rank."""
        return self._is_done.is_set()

    def begin(self) -> None:
        """The first step behind the switch is over. Any thread; twice is fine. Collective: none."""
        self._may_begin.set()

    def wait(self, timeout_s: float) -> bool:
        """Have it begin, and wait until it is done; False if it takes longer. Collective: none."""
        self.begin()
        return self._is_done.wait(timeout_s)

    def _run(self) -> None:
        parallel, self._parallel = self._parallel, None
        assert parallel is not None, "it runs once"
        if not self._plan.is_recovery:
            self._meet()
            self._may_begin.wait(FIRST_STEP_S)
        group = parallel.state.group
        try:
            # A worker that waits for the dead does so up to a deadline of its own.
            until = time.monotonic() + 4 * group.timeout.total_seconds()
            while not parallel.state.close(wait_s=1.0) and time.monotonic() < until:
                pass
            parallel.close()
        except Exception:
            # Nobody waits for it: what is left goes with the process.
            logger.exception("generation %d could not be closed whole", group.generation)
        group.close()
        bridge, self._bridge = self._bridge, None
        if bridge is not None:
            bridge.close()
        self._is_done.set()

    def _meet(self) -> None:
        """Wait until every rank of the generation has switched, or long enough."""
        try:
            self._store.tell(f"switched/{self._name}", "yes")
            with contextlib.suppress(CalledOff):
                self._store.hear_all("switched", self._plan.serving.held, self._deadline)
        except MembershipError as error:
            logger.warning("closing a generation without the others: %s", error)
