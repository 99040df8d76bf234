"""transformers while it makes a model: alone, and without its words on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from threading import RLock
from typing import Any

_ALONE = RLock()


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' bars and notices off the terminal, which belongs to the caller.

    One thread at a time: default dtype, verbosity and what transformers patches meanwhile are the
    process's.
    """
    with _ALONE:
        yield from _silence()


def _silence() -> Iterator[None]:
    logging: Any = import_module("transformers.utils.logging")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
