"""Questions to a store, asked on a thread that can be given up."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable

_IDLE_S = 2.0


class StoreThread:
    """Asks a store on a thread of its own: a client may block beyond its own timeout.

    The thread ends when nothing was asked for a while, and the next question begins another; so
    does one that comes after a question which was given up.

    Owner: any thread may ask; the lock guards the queue.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: queue.SimpleQueue[_Question] | None = None

    def ask(
        self,
        question: Callable[[], str],
        timeout_s: float,
        afterwards: Callable[[], None] = lambda: None,
    ) -> str | None:
        """What the store answers; None if it does not in time, or fails.

        Args:
            question: asks the store, on the thread.
            timeout_s: longest wait.
            afterwards: what else the thread has to do with the store; nobody waits for it.
        Collective: none.
        """
        answer: _Answer = queue.SimpleQueue()
        with self._lock:
            if self._asked is None:
                self._asked = queue.SimpleQueue()
                thread = threading.Thread(
                    target=self._run, args=(self._asked,), name="equipoise-store", daemon=True
                )
                thread.start()
            asked = self._asked
            asked.put((question, answer, afterwards))
        try:
            return answer.get(timeout=timeout_s)
        except queue.Empty:
            with self._lock:
                if self._asked is asked:
                    self._asked = None
            return None

    def _run(self, asked: queue.SimpleQueue[_Question]) -> None:
        while True:
            try:
                question, answer, afterwards = asked.get(timeout=_IDLE_S)
            except queue.Empty:
                with self._lock:
                    if asked.empty():
                        if self._asked is asked:
                            self._asked = None
                        return
                continue
            found: str | None = None
            # Whatever goes wrong here shows as no answer.
            with contextlib.suppress(RuntimeError):
                found = question()
            answer.put(found)
            with contextlib.suppress(RuntimeError):
                afterwards()


_Answer = queue.SimpleQueue[str | None]
_Question = tuple[Callable[[], str], _Answer, Callable[[], None]]
