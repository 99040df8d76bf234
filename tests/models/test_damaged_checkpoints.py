"""Checkpoints that are damaged: each damage is named before anything serves."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from equipoise import EPLBConfig
from equipoise.comm.groups import RankGroup
from equipoise.errors import ModelError
from equipoise.models.checkpoint import Checkpoint
from equipoise.models.headers import read_headers
from equipoise.models.loading import load_spread
from equipoise.models.parallel import _plan_sets
from tests.models.saved import save
from tests.models.thread_ranks import ThreadRanks

CONFIG = EPLBConfig(policy="deepseek", communicator="torch_gloo", use_async=False)
Damage = Callable[[Path], None]


def rewrite_header(file: Path, change: Callable[[dict[str, Any]], str | None]) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = change(header) or json.dumps(header)
    file.write_bytes(len(text).to_bytes(8, "little") + text.encode() + data[8 + length :])


def drop_tensors(directory: Path, *parts: str) -> None:
    from safetensors.torch import load_file, save_file

    file = directory / "model.safetensors"
    kept = {n: t for n, t in load_file(file).items() if not any(part in n for part in parts)}
    save_file(kept, file, metadata={"format": "pt"})


def replace_tensor(directory: Path, name: str, tensor: torch.Tensor) -> None:
    from safetensors.torch import load_file, save_file

    file = directory / "model.safetensors"
    save_file(load_file(file) | {name: tensor}, file, metadata={"format": "pt"})


GATE = "model.layers.1.mlp.gate.weight"
EXPERT = "model.layers.1.mlp.experts.5.down_proj.weight"


def truncate(directory: Path) -> None:
    file = directory / "model.safetensors"
    os.truncate(file, file.stat().st_size - 10)


def truncate_header(directory: Path) -> None:
    os.truncate(directory / "model.safetensors", 100)


def shape_header(directory: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header[GATE]["shape"] = [8, 31]

    rewrite_header(directory / "model.safetensors", change)


def name_twice(directory: Path) -> None:
    def change(header: dict[str, Any]) -> str:
        text = json.dumps(header)
        return text[:-1] + f', "{GATE}": ' + json.dumps(header[GATE]) + "}"

    rewrite_header(directory / "model.safetensors", change)


def unknown_dtype(directory: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header[GATE]["dtype"] = "F12"

    rewrite_header(directory / "model.safetensors", change)


def index_without_file(directory: Path) -> None:
    index = {"weight_map": {GATE: "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def index_without_tensor(directory: Path) -> None:
    index = {"weight_map": {GATE: "model.safetensors", "lm_head.wait": "model.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def two_files(directory: Path) -> None:
    from safetensors.torch import save_file

    save_file({GATE: torch.zeros(8, 32)}, directory / "more.safetensors")
    index = {"weight_map": {GATE: "model.safetensors", EXPERT: "more.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def no_header(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"garbage")


DAMAGES: list[tuple[Damage, str]] = [
    (truncate, r"model\.safetensors: is truncated: .* ends at byte \d+, the file at \d+"),
    (truncate_header, r"is truncated: its header ends at byte \d+, the file at 100"),
    (no_header, r"is truncated, or no safetensors file: it has no header"),
    (shape_header, rf"{GATE} of shape \[8, 31\] in F32 takes 992 bytes, but has 1024"),
    (name_twice, rf"its header names {GATE} twice"),
    (unknown_dtype, rf"{GATE} is stored as F12, which is no dtype of safetensors"),
    (index_without_file, r"lacks model-00001-of-00002\.safetensors"),
    (index_without_tensor, r"promises lm_head\.wait in model\.safetensors, which lacks it"),
    (two_files, rf"{GATE} is in model\.safetensors and in more\.safetensors too"),
    (lambda d: drop_tensors(d, GATE), r"the weights lack 1 tensors, like model\.layers\.1\.mlp\.g"),
    (
        lambda d: drop_tensors(d, "layers.1.mlp.experts.5."),
        r"model\.layers\.1\.mlp\.experts lacks expert 5 of 8: 7 tensors are stored like",
    ),
    (lambda d: drop_tensors(d, EXPERT), r"model\.layers\.1\.mlp\.experts lacks expert 5 of 8"),
    (
        lambda d: replace_tensor(d, EXPERT, torch.zeros(32, 31)),
        rf"{EXPERT} has shape \[32, 31\], but \[32, 32\] is wanted",
    ),
    (
        lambda d: replace_tensor(d, GATE, torch.zeros(8, 16)),
        rf"{GATE} has shape \[8, 16\], but \[8, 32\] is wanted",
    ),
    (
        lambda d: replace_tensor(d, GATE, torch.zeros(8, 32, dtype=torch.int8)),
        rf"{GATE} is stored as I8, but the model computes with floating point",
    ),
    (
        lambda d: replace_tensor(d, EXPERT, torch.zeros(32, 32, dtype=torch.int16)),
        rf"{EXPERT} is stored as I16, but the model computes with floating point",
    ),
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sound")
    save("Qwen3MoeExperts", directory)
    return directory


@pytest.mark.parametrize("number", range(len(DAMAGES)))
def test_damage_is_named_before_anything_is_read(number: int, sound: Path, tmp_path: Path) -> None:
    for file in sound.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    Checkpoint(tmp_path).close()
    damage, words = DAMAGES[number]
    damage(tmp_path)
    with pytest.raises(ModelError, match=words) as raised:
        Checkpoint(tmp_path)
    assert "\n" not in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def test_random_damage_to_a_header_is_an_error_or_none(sound: Path, tmp_path: Path) -> None:
    """Whatever stands in a header: one line that names the file, or a checkpoint that can be read.

    What can be read is: a change of a space, or of the order, does no harm.
    """
    for file in sound.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + length]
    random = np.random.default_rng(0)
    refused, checked = [], 0
    for number in range(400):
        text = damage_text(header, random)
        # Some keep their length, so that the text is cut or data begin elsewhere.
        start = whole[:8] if number % 2 else len(text).to_bytes(8, "little")
        file.write_bytes(start + text + whole[8 + length :])
        try:
            read_headers(tmp_path)
            if checked < 30:
                checked += 1
                with Checkpoint(tmp_path) as checkpoint:
                    for layer in checkpoint.layers:
                        checkpoint.read_expert(layer, number % 8)
        except ModelError as error:
            refused.append(str(error))
    assert all("\n" not in error and str(tmp_path) in error for error in refused)
    assert len(refused) > 200
    assert checked > 20


def damage_text(text: bytes, random: np.random.Generator) -> bytes:
    """Some bytes flipped, left out, repeated, or exchanged."""
    begin, end = sorted(random.integers(0, len(text), 2).tolist())
    end = min(end, begin + int(random.integers(1, 40)))
    match random.integers(4):
        case 0:
            return text[:begin] + bytes([int(random.integers(256))]) + text[begin + 1 :]
        case 1:
            return text[:begin] + text[end:]
        case 2:
            return text[:end] + text[begin:]
        case _:
            digits = [i for i in range(len(text)) if text[i : i + 1].isdigit()]
            place = digits[int(random.integers(len(digits)))]
            return text[:place] + b"%d" % random.integers(10) + text[place + 1 :]


def test_a_rank_that_cannot_load_ends_all(sound: Path, tmp_path: Path) -> None:
    for file in sound.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())

    def load(group: RankGroup) -> str:
        checkpoint = Checkpoint(tmp_path)
        plans = _plan_sets([checkpoint.layers], group, CONFIG, 1, None)
        group.barrier()
        if group.rank == 1:
            # It goes away after its header was read.
            checkpoint.stored[GATE].file.unlink()
        group.barrier()
        with pytest.raises(ModelError) as raised:
            load_spread(checkpoint, plans, group)
        return str(raised.value)

    ranks = ThreadRanks(2)
    first, second = ranks(load)
    ranks.close()
    assert "cannot be read" in first
    assert "cannot be read" in second
