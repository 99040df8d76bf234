"""Text of tokens that come one by one, and the stop strings in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

_BROKEN = "\ufffd"
"""What tokenizers write for bytes that are no character, or not yet one."""
_MAX_BROKEN = 3
"""Bytes of a character that is not whole; some tokenizers write one mark for each of them."""
_MAX_CONTEXT = 32
"""Tokens that are decoded again with each new one, where bytes follow that are no character."""


class Piece(NamedTuple):
    """New text, and whether a stop string has been met."""

    text: str
    stopped: bool


class TextStream:
    """Makes text of a request's generated tokens, as they come.

    What could be the begin of a stop string, or of a character of several bytes, is held back until
    it is known. However the tokens are parted, the pieces are the same text.

    Args:
        tokenizer: of the model.
        stop: strings that end the text; it is cut before the one that is complete first.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        # Tokens are decoded behind those before them: some begin a word, or not, by what precedes.
        self._tokens: list[int] = []
        self._num_said = 0
        self._held = ""
        self._stopped = False

    def push(self, tokens: Sequence[int]) -> Piece:
        """Take the next tokens. Collective: none."""
        text = ""
        for token in tokens:
            if not self._stopped:
                text += self._release(self._decode(token))
        return Piece(text, self._stopped)

    def finish(self) -> str:
        """The text is over: what was held back, unless a stop string ended it. Collective: none."""
        if self._stopped:
            return ""
        rest = self._held + self._to_text(self._tokens)[self._num_said :]
        self._tokens, self._num_said, self._held = [], 0, ""
        return rest

    def _decode(self, token: int) -> str:
        """Characters that this token completes."""
        self._tokens.append(token)
        text = self._to_text(self._tokens)
        num_broken = len(text) - len(text.rstrip(_BROKEN))
        until = max(self._num_said, len(text) - min(num_broken, _MAX_BROKEN))
        new = text[self._num_said : until]
        self._num_said = until
        num_kept = 1 if new and until == len(text) else _MAX_CONTEXT // 2
        if num_kept == 1 or len(self._tokens) > _MAX_CONTEXT:
            # The last tokens are context enough for those behind them.
            self._tokens = self._tokens[-num_kept:]
            self._num_said = len(self._to_text(self._tokens)) - (len(text) - until)
        return new

    def _to_text(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _release(self, new: str) -> str:
        """What of the text held and new cannot be part of a stop string."""
        text = self._held + new
        met = [(begin + len(stop), begin) for stop in self._stop if (begin := text.find(stop)) >= 0]
        if met:
            self._stopped, self._held = True, ""
            return text[: min(met)[1]]
        num_held = max((_count_begun(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def _count_begun(text: str, stop: str) -> int:
    """Characters at the end of a text that begin a stop string."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
