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
    BACK: tokens may end their detour, as far as this rank is concerned.
    ASIDE: tokens must take a detour before this rank can prepare any further.
    LOST: the store did not answer, so it will not know by itself.
    ABORT: the serving generation goes on.
    SWITCH: the next generation takes over.
    """

    OPEN = 0
    BACK = 1
    ASIDE = 2
    LOST = 3
    ABORT = 4
    SWITCH = 5


def settle(words: Sequence[int]) -> Word:
    """What all ranks do now: SWITCH, ABORT, ASIDE or BACK, or OPEN to go on as before.

    If all are lost, nobody who serves can ever know, so that all may call it off together. A detour
    begins and ends when all say so.

    Args:
        words: of every serving rank, as the meeting brought them; the same on every rank.
    Returns:
        The same on every rank; never LOST.
    Collective: none.
    """
    most = Word(max(words))
    if most in (Word.SWITCH, Word.ABORT):
        return most
    least = Word(min(words))
    if least is Word.LOST:
        return Word.ABORT
    return most if most is least else Word.OPEN
