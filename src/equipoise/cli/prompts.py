"""What `equipoise run` serves: texts of several kinds in turn, or the user's own."""

from __future__ import annotations

from pathlib import Path

from equipoise.bundled.texts import KINDS, excerpts
from equipoise.errors import ConfigError
from equipoise.job.spec import Prompt

PROMPT_BYTES = 192
PROMPTS_PER_HELD_OUT = 4
"""For each so many prompts, one more text is held out to score the loss on."""


def read_bundled(num_prompts: int) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """Each kind of text in turn, so that the load shifts.

    Args:
        num_prompts: over all kinds, which get as many each.
    Returns:
        Prompts by kind, and other texts of the same kinds.
    Raises: ConfigError if the kinds cannot share the number, or have less text.
    """
    _check_number(num_prompts)
    each, rest = divmod(num_prompts, len(KINDS))
    if rest:
        near = [len(KINDS) * n for n in (each, each + 1) if n]
        raise ConfigError(
            f"--prompts {num_prompts}: {len(KINDS)} kinds of text share them evenly, so ask for "
            f"{' or '.join(map(str, near))}"
        )
    prompts: list[Prompt] = []
    held_out: list[Prompt] = []
    for kind in KINDS:
        try:
            texts = excerpts(kind, each + -(-each // PROMPTS_PER_HELD_OUT), PROMPT_BYTES)
        except ConfigError as error:
            raise ConfigError(
                f"--prompts {num_prompts}: there is not so much text; ask for fewer, or give "
                f"your own by --input ({error})"
            ) from error
        for number, text in enumerate(texts):
            held = number % (PROMPTS_PER_HELD_OUT + 1) == 0
            (held_out if held else prompts).append(Prompt(kind, text))
    return tuple(prompts), tuple(held_out)


def read_file(path: Path, num_prompts: int | None) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """A user's own text, cut into pieces.

    Args:
        path: a UTF-8 text file.
        num_prompts: at most so many; None for all of the text.
    Returns:
        Prompts, and the texts to score: every fifth piece, or the only one there is.
    Raises: ConfigError that names the file, if it is missing, unreadable, not text or empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"--input {path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--input {path}: is not UTF-8 text: {error.reason}") from error
    except OSError as error:
        raise ConfigError(f"--input {path}: cannot be read: {error.strerror}") from error
    if not text.strip():
        raise ConfigError(f"--input {path}: is empty; give it some text to continue")
    if num_prompts is not None:
        _check_number(num_prompts)
    starts = range(0, len(text), PROMPT_BYTES)
    pieces = [text[start : start + PROMPT_BYTES] for start in starts]
    whole = [Prompt(path.stem, piece) for piece in pieces if piece.strip()]
    held_out = whole[:: PROMPTS_PER_HELD_OUT + 1]
    prompts = [p for i, p in enumerate(whole) if i % (PROMPTS_PER_HELD_OUT + 1)] or whole
    return tuple(prompts[:num_prompts]), tuple(held_out)


def _check_number(num_prompts: int) -> None:
    if num_prompts < 1:
        raise ConfigError(f"--prompts must be at least 1, got {num_prompts}")
