"""Whether the next generation is taken, and at which step.

Whether, the store settles: one word under one key, and the first to arrive stands. When, the ranks
that serve settle in the meeting that they hold before each step anyway: each says what it knows of
the word, and as all of them hear the same, all of them switch between the same two steps. Nobody
waits for the store on the way, and a rank that it does not answer hears the word from the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

SWITCH = "switch"
ABORT = "abort"


class Word(IntEnum):
    """What a rank knows of the change under way; travels in the meeting before a step.

    OPEN: nothing yet, or there is no change.
    LOST: the store did not answer, so it will not know by itself.
    ABORT: the serving generation goes on.
    SWITCH: the next generation takes over.
    """

    OPEN = 0
    LOST = 1
    ABORT = 2
    SWITCH = 3


def settle(words: Sequence[int]) -> Word:
    """What all ranks do now: SWITCH, ABORT, or OPEN to go on as before.

    If all are lost, nobody who serves can ever know, so that all may call it off together.

    Args:
        words: of every serving rank, as the meeting brought them; the same on every rank.
    Returns:
        The same on every rank; never LOST.
    Collective: none.
    """
    most = Word(max(words))
    if most in (Word.SWITCH, Word.ABORT):
        return most
    return Word.ABORT if min(words) == Word.LOST else Word.OPEN
