"""Prompts and held-out texts as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from equipoise.errors import ConfigError
from equipoise.job.spec import Prompt


def list_kinds(*groups: Sequence[Prompt]) -> tuple[str, ...]:
    """Kinds of text in the order in which they first occur."""
    return tuple(dict.fromkeys(text.kind for group in groups for text in group))


def encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Tokens of a text that is to be continued.

    The tokenizer's defaults, so a model that begins texts with a special token gets it; but not
    the end of the text that some (T5's and ByT5's) append, behind which nothing is continued.
    """
    tokens: list[int] = list(tokenizer(text, verbose=False)["input_ids"])
    if tokens and tokens[-1] == tokenizer.eos_token_id:
        tokens.pop()
    return tuple(tokens)


def encode_all(
    tokenizer: Any, texts: Sequence[Prompt], what: str, num_more: int, longest: int | None
) -> list[tuple[int, ...]]:
    """Tokens of texts, each of them short enough for the model.

    Args:
        tokenizer: of the model.
        texts: in their order.
        what: they are, for messages: "prompt".
        num_more: tokens that may come behind each.
        longest: tokens that the model takes, None where it does not say.
    Collective: none; the same on every rank.
    Raises: ConfigError, naming the text by number, if it is empty or too long.
    """
    encoded = []
    for number, text in enumerate(texts):
        tokens = encode(tokenizer, text.text)
        if not tokens:
            raise ConfigError(f"{what} {number} is empty: it needs at least one token")
        if longest is not None and len(tokens) + num_more > longest:
            room = f"{longest} tokens" + (f", {num_more} of them new" if num_more else "")
            raise ConfigError(f"{what} {number} has {len(tokens)} tokens: the model takes {room}")
        encoded.append(tokens)
    return encoded
