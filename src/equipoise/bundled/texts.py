"""Text of four kinds that the bundled model has not been trained on.

Python and English are read from the Python that runs, C and French from files beside this one.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from equipoise.errors import ConfigError, EquipoiseError

HELD_OUT_MODULES = (
    "bisect",
    "calendar",
    "csv",
    "difflib",
    "fractions",
    "heapq",
    "shlex",
    "statistics",
    "textwrap",
)
_LONGEST_CHARACTER = 4  # bytes in UTF-8


def _read_module(name: str) -> str:
    spec = find_spec(name)
    source = getattr(spec.loader, "get_source", None) if spec else None
    text = source(name) if source else None
    if text is None:
        raise EquipoiseError(
            f"Python text is read from the source of the standard library's {name}, "
            "which this Python lacks; use a Python that keeps its .py files"
        )
    return str(text)


def _read_python() -> str:
    return "\n".join(_read_module(name) for name in HELD_OUT_MODULES)


def _read_english() -> str:
    try:
        topics: dict[str, Any] = import_module("pydoc_data.topics").topics
    except ModuleNotFoundError as error:
        raise EquipoiseError(
            "English text is read from the standard library's pydoc_data.topics, which this "
            "Python lacks; install all of its standard library "
            "(on Debian and Ubuntu: libpython3-stdlib)"
        ) from error
    return "\n".join(str(topics[name]) for name in sorted(topics))


def _read_file(name: str) -> str:
    return (Path(__file__).parent / "texts" / name).read_text(encoding="utf-8")


_READERS: dict[str, Callable[[], str]] = {
    "python": _read_python,
    "english": _read_english,
    "c": lambda: _read_file("c.txt"),
    "french": lambda: _read_file("french.txt"),
}
KINDS: tuple[str, ...] = tuple(_READERS)


def read_kind(kind: str) -> str:
    """Read all held-out text of one kind.

    Raises:
        ConfigError: the kind is none of KINDS.
        EquipoiseError: this Python lacks the part of its standard library that is read.
    """
    if kind not in _READERS:
        raise ConfigError(f"Unknown kind of text {kind!r}; there are {', '.join(KINDS)}")
    return _READERS[kind]()


def excerpts(kind: str, count: int, num_bytes: int) -> list[str]:
    """Cut distinct excerpts of one size, spread evenly over the text of one kind.

    The same arguments give the same excerpts on the same Python. They do not overlap, and start
    at a line's start where one is near. One that would end inside a character ends before it, so
    in UTF-8 each has num_bytes bytes or up to 3 fewer.

    Args:
        kind: one of KINDS.
        count: how many excerpts.
        num_bytes: bytes of each in UTF-8.

    Raises:
        ConfigError: the kind is unknown, a number is too small, or the text too short.
        EquipoiseError: this Python lacks the part of its standard library that is read.
    """
    if count < 1 or num_bytes < _LONGEST_CHARACTER:
        raise ConfigError(
            f"excerpts needs count >= 1 and num_bytes >= {_LONGEST_CHARACTER}, "
            f"got {count} and {num_bytes}"
        )
    possible = _cut(read_kind(kind).encode(), num_bytes)
    if count > len(possible):
        raise ConfigError(
            f"Held-out text of kind {kind!r} gives {len(possible)} distinct excerpts of "
            f"{num_bytes} bytes, not {count}"
        )
    return [possible[i * len(possible) // count] for i in range(count)]


def _cut(text: bytes, num_bytes: int) -> list[str]:
    """All distinct excerpts, front to back."""
    found: dict[str, None] = {}
    start = 0
    while start + num_bytes <= len(text):
        end = _floor_to_character(text, start + num_bytes)
        found[text[start:end].decode()] = None
        # Skipping to the next line's start wastes little text where lines are short.
        line_end = text.find(b"\n", end - 1, end + num_bytes // 4)
        start = end if line_end < 0 else line_end + 1
    return list(found)


def _floor_to_character(text: bytes, index: int) -> int:
    """The last character boundary at or before index."""
    while index < len(text) and text[index] & 0b1100_0000 == 0b1000_0000:
        index -= 1
    return index
