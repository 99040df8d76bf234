"""How long each part of something took that goes on in several threads, one part at a time."""

from __future__ import annotations

import threading
import time


class PartTimes:
    """Seconds by part, in order. Any thread may begin the next part."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = {}
        self._name = ""
        self._began = 0.0

    def begin(self, name: str) -> None:
        """The part before is over, and another begins. Collective: none."""
        now = time.monotonic()
        with self._lock:
            self._end(now)
            self._name, self._began = name, now

    def end(self) -> dict[str, float]:
        """The last part is over: what each took. Collective: none."""
        with self._lock:
            self._end(time.monotonic())
            self._name = ""
            return dict(self._seconds)

    def _end(self, now: float) -> None:
        if self._name:
            taken = self._seconds.get(self._name, 0.0)
            self._seconds[self._name] = taken + now - self._began
