"""Checkpoints that transformers wrote, read by ranks: own experts and what all have, no more."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise import EPLBConfig, ParallelModel, parallelize
from equipoise.comm.groups import RankGroup
from equipoise.errors import ModelError
from equipoise.models.checkpoint import Checkpoint
from equipoise.models.experts import take_over
from equipoise.models.headers import StoredTensor, read_header
from equipoise.models.parallel import _plan_sets
from equipoise.models.read_ahead import FileReader, ReadAhead, Span, join_spans
from equipoise.models.stored_experts import Part, make_batches
from tests.models.saved import save
from tests.models.thread_ranks import ThreadRanks
from tests.models.tiny import Family, list_families, run
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


@pytest.mark.timeout(300)
def test_the_host_holds_its_own_weights_and_one_tensor(tmp_path: Path) -> None:
    # Freed memory goes back at once, so that what is seen is what is held.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
    code = f"import tests.models.test_checkpoint as t; t.measure_peak(t.Path({str(tmp_path)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        timeout=280,
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
