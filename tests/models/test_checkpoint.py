"""Checkpoints that transformers wrote, read by ranks: own experts and what all have, no more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from equipoise import EPLBConfig, ParallelModel, parallelize
from equipoise.comm.groups import RankGroup
from equipoise.errors import ModelError
from equipoise.models.checkpoint import Checkpoint
from equipoise.models.experts import take_over
from equipoise.models.headers import StoredTensor, read_header, read_headers
from equipoise.models.loading import load_spread
from equipoise.models.parallel import _plan_sets
from equipoise.models.read_ahead import FileReader, ReadAhead, Span, join_spans
from equipoise.models.stored_experts import Part, make_batches
from tests.models.thread_ranks import ThreadRanks
from tests.models.tiny import Family, list_families, make_tiny, run
from tests.ranks import Rank, processes

CONFIG = EPLBConfig(
    window_size=1, step_interval=1, policy="deepseek", communicator="torch_gloo", use_async=False
)
LAYOUTS = (
    "DeepseekV3Experts",  # an expert each, shared experts beside them
    "Ernie4_5_VLMoeMoeExperts",  # one list of experts for two modules, inside a larger model
    "GptOssExperts",  # fused, interleaved, transposed, with biases
    "GraniteMoeExperts",  # fused under other names
    "Llama4TextExperts",  # fused, through an adapter
    "MixtralExperts",  # an expert each, under other names
    "OlmoeExperts",
    "Qwen3VLMoeTextExperts",  # fused, stored transposed, inside a larger model
    "Step3p7Experts",
)
TOKENS = torch.arange(5, 25)[None]
Damage = Callable[[Path], None]


def find_family(experts: str) -> Family:
    return next(family for family in list_families() if family.experts == experts)


def choose_families() -> list[Any]:
    everything = bool(os.environ.get("EQUIPOISE_ALL_FAMILIES"))
    return [
        pytest.param(
            family,
            id=family.experts,
            marks=() if family.experts in LAYOUTS else pytest.mark.slow,
        )
        for family in list_families()
        if everything or family.experts in LAYOUTS
    ]


@pytest.fixture(scope="module")
def all_ranks() -> Iterator[dict[int, ThreadRanks]]:
    torch.set_num_threads(1)
    started = {size: ThreadRanks(size) for size in (1, 2, 4)}
    yield started
    for ranks in started.values():
        ranks.close()


def save(experts: str, directory: Path, **options: Any) -> Any:
    from transformers.utils import logging

    logging.disable_progress_bar()
    plain = make_tiny(find_family(experts))
    plain.save_pretrained(directory, **options)
    return plain


@pytest.mark.parametrize("family", choose_families())
def test_ranks_read_what_they_need(
    family: Family, tmp_path: Path, all_ranks: dict[int, ThreadRanks]
) -> None:
    if family.experts in ("Inkling2Experts", "Inkling2LoopExperts"):
        pytest.skip("transformers itself does not write a vocabulary as small as this one's")
    plain = save(family.experts, tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    check_batches(Checkpoint(tmp_path), plain)
    for num_ranks, ranks in all_ranks.items():
        parallels = ranks(lambda group: parallelize(tmp_path, group, CONFIG))
        for rank, parallel in enumerate(parallels):
            check_weights(parallel, plain, rank)
            check_bytes(parallel, rank, reads_twice="Ernie4_5_VL" in family.experts)
        for kernels in family.kernels[:1]:
            compare_logits(parallels, plain, ranks, kernels if len(family.kernels) > 1 else None)
        ranks(lambda group, parallels=parallels: parallels[group.rank].close())
        assert len(parallels) == num_ranks


def check_batches(checkpoint: Checkpoint, plain: Any) -> None:
    """Experts that are read ahead and converted together are those that are read one by one."""
    whole = plain.state_dict()
    ahead = ReadAhead(torch.device("cpu"), num_threads=2, chunk_bytes=1000, ahead_bytes=5000)
    for layer in checkpoint.layers:
        experts = [expert for expert in range(layer.num_experts) if expert != 3]
        batches = list(make_batches(checkpoint._experts[layer.name], layer, experts, 1 << 30))
        assert [expert for batch in batches for expert in batch.experts] == experts
        assert len(batches) == 2
        for batch in batches:
            spans = [part.span for part in batch.parts]
            read = {
                part: part.shaped(data)
                for part, data in zip(batch.parts, ahead.read(spans), strict=True)
            }
            made = checkpoint._convert(layer, batch.experts, read)
            for name, tensor in zip(layer.full_names(), made, strict=True):
                assert torch.equal(tensor, whole[name][list(batch.experts)]), name
    ahead.close()


def check_weights(parallel: ParallelModel, plain: Any, rank: int) -> None:
    whole = plain.state_dict()
    mine = parallel.model.state_dict()
    assert set(mine) == set(whole)
    per_expert: set[str] = set()
    for one in parallel.spread.sets:
        num_slots = one.maps.placement.topology.slots_per_rank
        first = rank * num_slots
        for row, (layer, weights) in enumerate(zip(one.layers, one.weights, strict=True)):
            held = one.maps.placement.slot_to_expert[row, first : first + num_slots]
            for name, slots in zip(layer.full_names(), weights, strict=True):
                per_expert.add(name)
                for slot, expert in enumerate(held):
                    wanted = whole[name][expert] if expert >= 0 else torch.zeros_like(slots[slot])
                    assert torch.equal(slots[slot], wanted)
    for name in set(whole) - per_expert:
        assert torch.equal(mine[name], whole[name]), name
    buffers = dict(plain.named_buffers())
    for name, buffer in parallel.model.named_buffers():
        assert buffer.device.type == "cpu"
        if name not in per_expert:
            assert torch.equal(buffer, buffers[name]), name


def check_bytes(parallel: ParallelModel, rank: int, *, reads_twice: bool) -> None:
    checkpoint = parallel.checkpoint
    assert checkpoint is not None
    experts = 0
    for one in parallel.spread.sets:
        num_slots = one.maps.placement.topology.slots_per_rank
        mine = one.maps.placement.slot_to_expert[:, rank * num_slots : (rank + 1) * num_slots]
        for layer, held in zip(one.layers, mine, strict=True):
            logical = sum(getattr(layer.module, name)[0].numel() * 4 for name in layer.tensors)
            experts += logical * len({expert for expert in held.tolist() if expert >= 0})
    due = checkpoint.shared_bytes + experts
    assert checkpoint.bytes_read >= due
    # Where text and vision experts are one list, an expert of one is read with one of the other.
    assert checkpoint.bytes_read <= due * 1.05 + (experts if reads_twice else 0)


def compare_logits(
    parallels: list[ParallelModel], plain: Any, ranks: ThreadRanks, kernels: str | None
) -> None:
    if kernels is not None:
        plain.set_experts_implementation(kernels)

    def serve(group: RankGroup) -> torch.Tensor:
        parallel = parallels[group.rank]
        if kernels is not None:
            parallel.model.set_experts_implementation(kernels)
        with parallel.route():
            return run(parallel.model, TOKENS + group.rank)

    for rank, got in enumerate(ranks(serve)):
        wanted = run(plain, TOKENS + rank)
        if kernels is None or "Zaya" in type(plain).__name__:
            # With one expert per token a rank may get a single row: another kernel multiplies it.
            assert torch.allclose(got, wanted, rtol=0, atol=2e-6)
        else:
            assert torch.equal(got, wanted)


def test_single_experts_can_be_read_later(tmp_path: Path) -> None:
    for experts in ("MixtralExperts", "GptOssExperts"):
        directory = tmp_path / experts
        plain = save(experts, directory)
        with Checkpoint(directory) as checkpoint:
            layer = checkpoint.layers[1]
            before = checkpoint.bytes_read
            tensors = checkpoint.read_expert(layer, 5)
            assert checkpoint.bytes_read - before == checkpoint.count_bytes(layer)
            assert checkpoint.count_bytes(layer) == sum(tensor.nbytes for tensor in tensors)
            for name, tensor in zip(layer.full_names(), tensors, strict=True):
                assert torch.equal(tensor, plain.state_dict()[name][5])


def test_what_is_read_ahead_comes_in_order_and_whole(tmp_path: Path) -> None:
    file = tmp_path / "bytes"
    data = torch.randint(256, (50_000,), dtype=torch.uint8)
    file.write_bytes(data.numpy().tobytes())
    random = torch.Generator().manual_seed(0)
    ends = torch.randint(50_000, (200, 2), generator=random).sort(1).values.tolist()
    ahead = ReadAhead(torch.device("cpu"), num_threads=4, chunk_bytes=777, ahead_bytes=20_000)
    got = list(ahead.read(Span(file, begin, end - begin) for begin, end in ends))
    assert all(torch.equal(tensor, data[b:e]) for tensor, (b, e) in zip(got, ends, strict=True))
    # Spans that follow each other are read at once, and not more than an eighth of what is ahead.
    follow = [Span(file, begin, 500) for begin in range(0, 50_000, 500)]
    assert [len(parts) for _, parts in join_spans(follow, 2500)] == [5] * 20
    assert torch.equal(torch.cat(list(ahead.read(follow))), data)
    several = ahead.read(Span(file, 0, 10_000) for _ in range(9))
    next(several)
    several.close()
    with pytest.raises(ModelError, match=r"bytes: is truncated: it ends at byte 50000"):
        list(ahead.read([Span(file, 0, 10), Span(file, 40_000, 20_000), Span(file, 0, 5000)]))
    ahead.close()
    file.unlink()
    with pytest.raises(ModelError, match=r"bytes: cannot be read: No such file"):
        FileReader().fill(Span(file, 0, 1), torch.empty(1, dtype=torch.uint8))


def test_tensors_that_are_read_at_once_need_not_be_aligned(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {
        "a": torch.arange(3, dtype=torch.uint8),
        "b": torch.arange(5, dtype=torch.float32),
        "c": torch.tensor(2.0),
        "d": torch.zeros(0, 7),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    parts = [Part(stored) for stored in read_header(tmp_path / "model.safetensors")]
    ahead = ReadAhead(torch.device("cpu"), num_threads=2)
    for order in (parts, parts[::-1], parts[1:], parts[::2]):
        for part, read in zip(order, ahead.read(part.span for part in order), strict=True):
            assert torch.equal(part.shaped(read), tensors[part.stored.name])
    odd = tmp_path / "odd"
    odd.write_bytes(b"x" + tensors["b"].numpy().tobytes())
    part = Part(StoredTensor("b", odd, "F32", (5,), 20, 1))
    _, data = ahead.read([Span(odd, 0, 1), part.span])
    assert torch.equal(part.shaped(data), tensors["b"])
    ahead.close()


def test_progress_reaches_what_is_due(tmp_path: Path, all_ranks: dict[int, ThreadRanks]) -> None:
    save("OlmoeExperts", tmp_path)

    def load(group: RankGroup) -> None:
        told: list[tuple[int, int]] = []
        parallel = parallelize(tmp_path, group, CONFIG, progress=lambda *words: told.append(words))
        assert [read for read, _ in told] == sorted(read for read, _ in told)
        assert {due for _, due in told} == {told[-1][0]}
        parallel.close()

    all_ranks[2](load)


@processes(2)
def test_weights_take_another_dtype(rank: Rank) -> None:
    from transformers import AutoModelForCausalLM

    group = rank.make_group()
    directory = rank.path / str(rank.rank)
    save("MixtralExperts", directory)
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    parallel = parallelize(directory, group, CONFIG, dtype=torch.bfloat16)
    check_weights(parallel, plain, group.rank)
    assert parallel.model.dtype == torch.bfloat16
    parallel.close()
    group.barrier()


def test_the_host_holds_its_own_weights_and_one_tensor(tmp_path: Path) -> None:
    # Freed memory goes back at once, so that what is seen is what is held.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
    code = f"import tests.models.test_checkpoint as t; t.measure_peak(t.Path({str(tmp_path)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def measure_peak(directory: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 1000, "num_hidden_layers": 4, "num_local_experts": 16}
    large = MixtralConfig(hidden_size=512, intermediate_size=512, **sizes)
    small = MixtralConfig(
        hidden_size=32, intermediate_size=32, num_attention_heads=4, num_hidden_layers=1
    )
    MixtralForCausalLM(large).save_pretrained(directory / "large", max_shard_size="80MB")
    MixtralForCausalLM(small).save_pretrained(directory / "small")
    ranks = ThreadRanks(2)
    # Imports and threads of the first load are not its weights.
    load(directory / "small", ranks.groups[0])
    before = read_anonymous_bytes()
    with sampled_peak() as peak:
        checkpoint = load(directory / "large", ranks.groups[0])
    own = sum(tensor.nbytes for tensor in checkpoint.model.state_dict().values())
    largest = max(stored.num_bytes for stored in checkpoint.stored.values())
    assert own > 100_000_000
    # Three stored tensors of an expert are one on their way.
    assert peak[0] - before <= own + 4 * largest + 4_000_000, (peak[0] - before, own, largest)
    os._exit(0)


def load(directory: Path, group: RankGroup) -> Checkpoint:
    """What one rank of several does to load, without the others."""
    checkpoint = Checkpoint(directory)
    plans = _plan_sets([checkpoint.layers], group, CONFIG, 1, None)
    take_over(checkpoint.model, plans, group.rank, checkpoint)
    checkpoint.load_shared()
    return checkpoint


def read_anonymous_bytes() -> int:
    """Memory of this process that is of no file."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


class sampled_peak:  # noqa: N801 - used as a function
    """Anonymous memory at its highest, looked at all the time."""

    def __enter__(self) -> list[int]:
        self._peak = [0]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self._peak

    def _watch(self) -> None:
        while not self._ended.wait(0.001):
            self._peak[0] = max(self._peak[0], read_anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._peak[0] = max(self._peak[0], read_anonymous_bytes())


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


def test_a_rank_that_cannot_load_ends_all(
    sound: Path, tmp_path: Path, all_ranks: dict[int, ThreadRanks]
) -> None:
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

    first, second = all_ranks[2](load)
    assert "cannot be read" in first
    assert "cannot be read" in second
