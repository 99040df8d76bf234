"""Text of tokens that come one by one, however they come."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.bundled import model_directory
from equipoise.engine.detokenizer import TextStream
from equipoise.models.loading import load_tokenizer

TEXT = "Grüße, 🌍! naïve — 数学 \N{ZERO WIDTH JOINER} stop here, not st op"


@cache
def bundled() -> Any:
    return load_tokenizer(model_directory())


@cache
def bytes_of_text() -> Any:
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def read(stream: TextStream, tokens: list[int], sizes: list[int]) -> tuple[str, bool]:
    said, stopped, at = "", False, 0
    for size in [*sizes, len(tokens)]:
        text, stopped = stream.push(tokens[at : at + size])
        said, at = said + text, at + size
    return said + stream.finish(), stopped


@pytest.mark.parametrize("get", [bundled, bytes_of_text])
@given(sizes=st.lists(st.integers(0, 7), max_size=30))
@settings(max_examples=40)
def test_pieces_are_the_text_however_tokens_are_parted(get: Any, sizes: list[int]) -> None:
    tokens = encode(get(), TEXT)
    assert read(TextStream(get()), tokens, sizes) == (TEXT, False)


@pytest.mark.parametrize("get", [bundled, bytes_of_text])
@given(sizes=st.lists(st.integers(0, 7), max_size=30))
@settings(max_examples=40)
def test_text_ends_before_the_stop_string_that_is_complete_first(
    get: Any, sizes: list[int]
) -> None:
    tokens = encode(get(), TEXT)
    stream = TextStream(get(), ["stop here, not st op", "op her", "never", "学 \N{BLACK STAR}"])
    assert read(stream, tokens, sizes) == (TEXT[: TEXT.index("op her")], True)
    assert stream.push(tokens) == ("", True)


def test_what_begins_a_stop_string_waits_and_comes_at_the_end() -> None:
    stream = TextStream(bytes_of_text(), ["END"])
    assert stream.push(encode(bytes_of_text(), "the E")) == ("the ", False)
    assert stream.push(encode(bytes_of_text(), "N")) == ("", False)
    assert stream.push(encode(bytes_of_text(), "E")) == ("EN", False)
    assert stream.finish() == "E"
    assert stream.finish() == ""


def test_a_character_waits_until_it_is_whole() -> None:
    stream = TextStream(bytes_of_text())
    pieces = [stream.push([token]).text for token in encode(bytes_of_text(), "a🌍b")]
    assert pieces == ["a", "", "", "", "🌍", "b"]
    broken = TextStream(bytes_of_text())
    half = encode(bytes_of_text(), "🌍")[:2]
    assert broken.push(half).text == ""
    assert broken.finish() == bytes_of_text().decode(half)


def test_bytes_that_are_no_text_do_not_hold_it_back_for_ever() -> None:
    lone = encode(bytes_of_text(), "é")[1]
    stream = TextStream(bytes_of_text())
    said = "".join(stream.push([lone]).text for _ in range(150))
    assert said + stream.finish() == bytes_of_text().decode([lone] * 150)
