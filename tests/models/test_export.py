"""A checkpoint written from whatever placement stands has the bytes of the one that was read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise import ParallelModel, parallelize
from equipoise.comm.groups import RankGroup
from equipoise.errors import ModelError
from equipoise.models.headers import StoredTensor, read_headers
from tests.models.saved import save
from tests.models.test_checkpoint import CONFIG, LAYOUTS
from tests.models.thread_ranks import ThreadRanks
from tests.models.tiny import run


@pytest.fixture(scope="module")
def ranks() -> Iterator[ThreadRanks]:
    torch.set_num_threads(1)
    started = ThreadRanks(4)
    yield started
    started.close()


def rebalance(parallel: ParallelModel, rank: int) -> int:
    moves = 0
    for step in range(3):
        random = torch.Generator().manual_seed(step)
        tokens = torch.randint(10 * step + 3, 10 * step + 9, (1, 20), generator=random)
        with parallel.route() as model:
            run(model, tokens)
        moves += sum(outcome.moves for outcome in parallel.step())
    return moves


def read_bytes(directory: Path) -> dict[str, tuple[Any, ...]]:
    from safetensors import safe_open

    found = {}
    stored: StoredTensor
    for name, stored in read_headers(directory).items():
        with safe_open(stored.file, framework="pt") as file:
            data = file.get_tensor(name).contiguous().reshape(-1).view(torch.uint8)
        found[name] = (stored.dtype, stored.shape, data.numpy().tobytes())
    return found


@pytest.mark.parametrize("experts", LAYOUTS)
def test_what_is_written_is_what_was_read(experts: str, tmp_path: Path, ranks: ThreadRanks) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    save(experts, source, max_shard_size="100KB")
    (source / "tokenizer.json").write_text("{}")

    def write(group: RankGroup) -> int:
        parallel = parallelize(source, group, CONFIG)
        moves = rebalance(parallel, group.rank)
        parallel.to_checkpoint(target)
        parallel.close()
        return moves

    assert min(ranks(write)) > 0
    assert read_bytes(target) == read_bytes(source)
    assert (target / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert (target / "tokenizer.json").read_text() == "{}"
    assert sorted(tmp_path.iterdir()) == [source, target]


def test_transposed_weights_are_written_transposed(tmp_path: Path, ranks: ThreadRanks) -> None:
    from safetensors.torch import load_file, save_file

    source, target = tmp_path / "source", tmp_path / "target"
    save("Qwen3VLMoeTextExperts", source)
    file = source / "model.safetensors"
    tensors = {
        name: tensor.transpose(1, 2).contiguous() if name.endswith("gate_up_proj") else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})

    def write(group: RankGroup) -> None:
        parallel = parallelize(source, group, CONFIG)
        parallel.to_checkpoint(target)
        parallel.close()

    ranks(write)
    assert read_bytes(target) == read_bytes(source)


def test_dtypes_of_the_source_are_kept(tmp_path: Path, ranks: ThreadRanks) -> None:
    source = tmp_path / "source"
    plain = save("OlmoeExperts", source)
    plain.to(torch.bfloat16).save_pretrained(tmp_path / "half")

    def write(group: RankGroup) -> None:
        wide = parallelize(tmp_path / "half", group, CONFIG, dtype=torch.float32)
        wide.to_checkpoint(tmp_path / "again")
        wide.close()
        narrow = parallelize(source, group, CONFIG, dtype=torch.bfloat16)
        with pytest.raises(ModelError, match=r"stored as F32, but was read as bf|could not"):
            narrow.to_checkpoint(tmp_path / "never")
        narrow.close()

    ranks(write)
    assert read_bytes(tmp_path / "again") == read_bytes(tmp_path / "half")
    assert not (tmp_path / "never").exists()
    assert not (tmp_path / "never.partial").exists()


def test_a_model_given_whole_is_written_as_transformers_does(
    tmp_path: Path, ranks: ThreadRanks
) -> None:
    import copy

    plain = save("MixtralExperts", tmp_path / "plain")

    def write(group: RankGroup) -> None:
        parallel = parallelize(copy.deepcopy(plain), group, CONFIG)
        rebalance(parallel, group.rank)
        parallel.to_checkpoint(tmp_path / "written")
        with pytest.raises(ModelError, match=r"is there already|rank 0 could not write"):
            parallel.to_checkpoint(tmp_path / "written")
        parallel.close()

    ranks(write)
    assert read_bytes(tmp_path / "written") == read_bytes(tmp_path / "plain")
