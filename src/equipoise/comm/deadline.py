"""A deadline for calls that have none of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

_Answer = TypeVar("_Answer")


def call_in_time(call: Callable[[], _Answer], seconds: float) -> _Answer:
    """Call what may block for good, as a store's client does whose server has stopped.

    Args:
        call: made by a thread of its own, in which it goes on if it is given up.
        seconds: until then.
    Collective: as the call.
    Raises: TimeoutError if it is given up; what the call raises.
    """
    answers: list[_Answer] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            answers.append(call())
        except Exception as error:  # raised again below
            errors.append(error)

    thread = threading.Thread(target=run, name="equipoise-call", daemon=True)
    thread.start()
    thread.join(seconds)
    if answers:
        return answers[0]
    if errors:
        raise errors[0]
    raise TimeoutError(f"not within {seconds:.1f} s")
