"""The bundled text: repeatable excerpts that training cannot have seen."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from equipoise.bundled import KINDS, excerpts, model_directory, read_kind, texts
from equipoise.errors import ConfigError, EquipoiseError


@pytest.mark.parametrize("kind", KINDS)
def test_excerpts_are_repeatable_distinct_and_of_one_size(kind: str) -> None:
    found = excerpts(kind, 128, 192)
    assert found == excerpts(kind, 128, 192)
    assert len(set(found)) == 128
    assert all(189 <= len(text.encode()) <= 192 for text in found)
    text = read_kind(kind)
    assert all(excerpt in text for excerpt in found)


@pytest.mark.parametrize("kind", KINDS)
def test_excerpts_are_spread_over_the_text(kind: str) -> None:
    text = read_kind(kind)
    places = [text.index(excerpt) / len(text) for excerpt in excerpts(kind, 4, 512)]
    assert places == sorted(places)
    assert places[0] < 0.05
    assert places[3] > 0.6


def test_excerpts_split_no_character(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(map(chr, range(0xE0, 0x2000))) + "".join(map(chr, range(0x1F600, 0x1F640)))
    monkeypatch.setitem(texts._READERS, "french", lambda: text)
    for num_bytes in range(4, 40):
        found = texts._cut(text.encode(), num_bytes)
        assert all(num_bytes - 3 <= len(part.encode()) <= num_bytes for part in found)
        assert text.startswith("".join(found))


def test_excerpts_start_at_lines_where_these_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"line {i:04}\n" for i in range(1000))
    monkeypatch.setitem(texts._READERS, "c", lambda: text)
    assert all(part.startswith("line ") for part in excerpts("c", 100, 64))


def test_repeated_text_gives_distinct_excerpts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(texts._READERS, "c", lambda: "same\n" * 1000)
    with pytest.raises(ConfigError, match="gives 1 distinct excerpts of 5 bytes, not 2"):
        excerpts("c", 2, 5)


def test_an_unknown_kind_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'latin'; there are python, english, c, french"):
        read_kind("latin")
    with pytest.raises(ValueError, match="'latin'"):
        excerpts("latin", 1, 192)


def test_too_many_excerpts_says_how_many_there_are() -> None:
    with pytest.raises(ConfigError, match=r"'c' gives \d+ distinct .* of 192 bytes, not 9999"):
        excerpts("c", 9999, 192)


@pytest.mark.parametrize(("count", "num_bytes"), [(0, 192), (1, 3), (-1, 192)])
def test_senseless_sizes_are_refused(count: int, num_bytes: int) -> None:
    with pytest.raises(ConfigError, match=f"got {count} and {num_bytes}"):
        excerpts("c", count, num_bytes)


def test_a_python_without_topics_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(EquipoiseError, match=r"pydoc_data\.topics, which this Python lacks"):
        read_kind("english")


def test_a_python_without_sources_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "HELD_OUT_MODULES", ("heapq", "no_such_module"))
    with pytest.raises(EquipoiseError, match="no_such_module, which this Python lacks"):
        read_kind("python")


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    return import_module("small_moe_corpus")


def test_training_reads_no_held_out_module(corpus: ModuleType) -> None:
    source = next(source for source in corpus.SOURCES if source.kind == "python")
    names = {path.name for path in corpus.list_files(source)}
    assert "argparse.py" in names
    assert not names & {f"{name}.py" for name in texts.HELD_OUT_MODULES}
    assert "topics.py" not in names


def test_training_drops_a_paragraph_that_is_held_out(corpus: ModuleType) -> None:
    held_out = set(corpus.list_shingles(read_kind("c")))
    assert corpus.repeats(excerpts("c", 1, 1000)[0], held_out)
    assert not corpus.repeats("int main(void) { return puts('one of its own') < 0; }", held_out)


def test_the_model_directory_is_a_checkpoint() -> None:
    directory = model_directory()
    files = {path.name: path.stat().st_size for path in directory.iterdir() if path.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer_config.json", "README.md"} <= set(files)
    assert sum(files.values()) < 6_000_000
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert config["vocab_size"] == 384
