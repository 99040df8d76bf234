"""One line of JSON for each request and whatever else happens, without what clients say."""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
import traceback
from typing import Any, TextIO

_LONGEST_TAIL = 10_000
_END_S = 5.0


class JsonLog:
    """Writes lines from a thread of its own, so that a slow disk or a full pipe holds nobody up.

    Any thread may write. Where lines come faster than they can be written some are left out, and
    the next one says how many.

    Args:
        stream: gets the lines; stays the caller's.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(_LONGEST_TAIL)
        self._lock = threading.Lock()
        self._num_lost = 0
        self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)
        self._thread.start()

    def write(self, event: str, **values: Any) -> None:
        """Add a line.

        Args:
            event: what happened.
            values: of JSON's types; None is left out.
        """
        said = {key: value for key, value in values.items() if value is not None}
        with self._lock:
            if self._num_lost:
                said["lines_lost"] = self._num_lost
            line = json.dumps({"time": _now(), "event": event, **said})
            try:
                self._lines.put_nowait(line)
                self._num_lost = 0
            except queue.Full:
                self._num_lost += 1

    def write_failure(self, event: str, error: BaseException, **values: Any) -> None:
        """Add a line about an error: what it was and where, but not its words, which may quote."""
        frames = traceback.extract_tb(error.__traceback__)
        where = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
        self.write(event, error=type(error).__name__, traceback=where, **values)

    def close(self) -> None:
        """Write what is left, for some seconds at most."""
        try:
            self._lines.put(None, timeout=_END_S)
        except queue.Full:
            return
        self._thread.join(_END_S)

    def _write_all(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._stream.write(line + "\n")
                if self._lines.empty():
                    self._stream.flush()
            except (OSError, ValueError):  # the disk is full, or nobody reads any more
                with self._lock:
                    self._num_lost += 1


class LogHandler(logging.Handler):
    """Has what other parts log written as our lines."""

    def __init__(self, log: JsonLog) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        said = {"logger": record.name, "level": record.levelname.lower()}
        if record.exc_info and record.exc_info[1] is not None:
            self._log.write_failure("log", record.exc_info[1], **said)
        else:
            self._log.write("log", message=record.getMessage(), **said)


def _now() -> str:
    seconds, fraction = divmod(time.time(), 1)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{int(fraction * 1e6):06d}Z"
