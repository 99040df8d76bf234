"""A whole job: what it emits, and that both passes and the plain model agree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise.config import EPLBConfig
from equipoise.engine.requests import Request
from equipoise.errors import ConfigError, EquipoiseError, ModelError, PlacementError
from equipoise.job.check import check_outputs
from equipoise.job.job import MERGE_STEPS, run_job
from equipoise.job.loss import Text, score_plain
from equipoise.job.records import (
    JobRecord,
    LoadRecord,
    PhaseRecord,
    RebalanceRecord,
    Record,
    ResultRecord,
    StepRecord,
)
from equipoise.job.spec import JobSpec, Prompt
from equipoise.job.texts import encode
from equipoise.models.loading import load_tokenizer
from equipoise.placement import Placement, place_in_order
from equipoise.topology import Topology
from tests.ranks import Rank, processes
from tests.test_models import EXPERTS, LAYERS, TOP_K, make_lone_group, make_model

BYTES = 384
PROSE = "It was a bright day, and the clocks agreed."
CODE = "def balance(load):\n    return load.mean()"


def save_model(directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    from transformers import ByT5Tokenizer

    model: Any = make_model("qwen3_moe", BYTES)
    model.to(dtype).save_pretrained(directory)
    ByT5Tokenizer().save_pretrained(directory)
    return directory


def make_spec(directory: Path, num_ranks: int) -> JobSpec:
    prompts = [Prompt("prose", PROSE[: 7 + 5 * i]) for i in range(6)]
    prompts += [Prompt("code", CODE[: 4 + 9 * i]) for i in range(3)]
    return JobSpec(
        model=directory,
        prompts=tuple(prompts),
        held_out=(Prompt("prose", PROSE), Prompt("code", CODE), Prompt("code", CODE[::-1])),
        num_ranks=num_ranks,
        config=EPLBConfig(
            window_size=8,
            step_interval=6,
            policy="deepseek",
            communicator="torch_gloo",
            use_async=False,
        ),
        max_new_tokens=11,
        max_batch_size=2,
    )


@processes(3)
def test_a_job_tells_everything_in_order(rank: Rank) -> None:
    directory = rank.path / "model"
    if rank.rank == 0:
        save_model(directory)
    group = rank.make_group(timeout_s=30)
    group.barrier()
    spec = make_spec(directory, 3)
    said: list[Record] = []
    run_job(spec, group, said.append)
    group.barrier()
    if rank.rank != 0:
        assert said == []
        return
    # Those come where reading takes long, on a busy machine.
    said = [record for record in said if not isinstance(record, LoadRecord)]
    job, result = said[0], said[-1]
    assert isinstance(job, JobRecord)
    assert isinstance(result, ResultRecord)
    assert job.kinds == ("prose", "code")
    assert (job.device, job.dtype, job.communicator) == ("cpu", "float32", "torch_gloo")
    assert job.placement == place_in_order(LAYERS, EXPERTS, Topology(3, 4))
    assert job.expert_bytes == 3 * 24 * 32 * 4
    assert job.num_parameters == sum(p.numel() for p in make_model("qwen3_moe", BYTES).parameters())
    phases = [record.phase for record in said if isinstance(record, PhaseRecord)]
    assert phases == ["off", "loss", "on", "loss", "check"]
    check_steps(spec, job, said)
    check_rebalances(job, said)
    check_result(spec, result)


@processes(2)
def test_a_job_says_which_wire_auto_chose_and_why(rank: Rank) -> None:
    directory = rank.path / "model"
    if rank.rank == 0:
        save_model(directory)
    group = rank.make_group(timeout_s=30)
    group.barrier()
    auto = EPLBConfig(window_size=8, step_interval=6, communicator="auto")
    spec = replace(make_spec(directory, 2), config=auto, max_steps=1, check=False)
    said: list[Record] = []
    run_job(spec, group, said.append)
    if rank.rank == 0:
        (job,) = [record for record in said if isinstance(record, JobRecord)]
        assert job.communicator == "nixl (auto; every rank has NIXL)"


def check_steps(spec: JobSpec, job: JobRecord, said: list[Record]) -> None:
    steps = {
        name: [r for r in said if isinstance(r, StepRecord) and r.in_pass == name]
        for name in ("off", "on")
    }
    for records in steps.values():
        assert [record.step for record in records] == list(range(1, len(records) + 1))
        assert sum(r.num_new_tokens for r in records) == 9 * spec.max_new_tokens
        prompt_tokens = sum(len(prompt.text) for prompt in spec.prompts)
        total = prompt_tokens + 9 * (spec.max_new_tokens - 1)
        assert sum(r.num_tokens for r in records) == total
        assert sum(r.logical_count.sum() for r in records) == total * TOP_K * LAYERS
        assert {r.kind for r in records} == {"prose", "code"}
    for off, on in zip(steps["off"], steps["on"], strict=True):
        assert (off.logical_count == on.logical_count).all()
        assert (off.num_tokens, off.kind) == (on.num_tokens, on.kind)


def check_rebalances(job: JobRecord, said: list[Record]) -> None:
    rebalances = [record for record in said if isinstance(record, RebalanceRecord)]
    assert [record.step % 6 for record in rebalances] == [0] * len(rebalances)
    assert any(record.moves for record in rebalances)
    placement: Placement = job.placement
    for record in said[said.index(rebalances[0]) :]:
        if isinstance(record, RebalanceRecord):
            placement = record.placement
        elif isinstance(record, StepRecord):
            # Tokens go where the placement in force puts their experts.
            assert not record.slot_count[placement.slot_to_expert < 0].any()
            for expert in range(EXPERTS):
                held = (record.slot_count * (placement.slot_to_expert == expert)).sum(axis=1)
                assert (held == record.logical_count[:, expert]).all()


def check_result(spec: JobSpec, result: ResultRecord) -> None:
    assert result.check is not None
    assert result.check.num_tokens == 2 * 9 * spec.max_new_tokens
    assert result.check.outputs_identical
    assert result.check.divergence is None
    assert 0 < result.check.max_logit_diff < 1e-4
    assert [(loss.kind, loss.num_tokens) for loss in result.losses] == [
        ("prose", len(PROSE) - 1),
        ("code", 2 * len(CODE) - 2),
    ]
    for loss in result.losses:
        assert loss.plain is not None
        assert abs(loss.off - loss.plain) < 1e-5
        assert abs(loss.on - loss.plain) < 1e-5
    assert set(result.seconds) == {"off", "on"}
    assert [(kind, text) for kind, text, _ in result.samples] == [
        ("prose", PROSE[:7]),
        ("code", CODE[:4]),
    ]
    assert all(isinstance(text, str) for _, _, text in result.samples)


def run_alone(spec: JobSpec) -> list[Record]:
    said: list[Record] = []
    run_job(spec, make_lone_group(), said.append)
    return said


def test_steps_can_be_limited_and_the_check_left_out(tmp_path: Path) -> None:
    spec = replace(make_spec(save_model(tmp_path), 1), max_steps=MERGE_STEPS + 3, check=False)
    said = run_alone(spec)
    steps = [record.step for record in said if isinstance(record, StepRecord)]
    assert steps == 2 * list(range(1, MERGE_STEPS + 4))
    result = said[-1]
    assert isinstance(result, ResultRecord)
    assert result.check is None
    assert [loss.plain for loss in result.losses] == [None, None]
    assert PhaseRecord("check") not in said


def test_requests_that_steps_did_not_reach_are_no_difference(tmp_path: Path) -> None:
    result = run_alone(replace(make_spec(save_model(tmp_path), 1), max_steps=3))[-1]
    assert isinstance(result, ResultRecord)
    assert result.check is not None
    # Two rows, three steps, both passes.
    assert (result.check.num_tokens, result.check.num_identical) == (12, 12)


def test_half_precision_serves_too(tmp_path: Path) -> None:
    spec = replace(make_spec(save_model(tmp_path), 1), dtype="bfloat16")
    result = run_alone(spec)[-1]
    assert isinstance(result, ResultRecord)
    assert result.check is not None
    assert result.check.num_identical > 0
    assert (result.check.divergence is None) == result.check.outputs_identical


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_ranks": 2}, ConfigError, "the job is for 2 ranks, but the group has 1"),
        ({"device": "cuda"}, ConfigError, "the job is for cuda, but the group is on cpu"),
        ({"prompts": ()}, ConfigError, "there are no prompts"),
        ({"max_batch_size": 0}, ConfigError, "max_batch_size must be at least 1, got 0"),
        ({"max_steps": 0}, ConfigError, "max_steps must be at least 1, got 0"),
        ({"prompts": (Prompt("a", "x"), Prompt("a", ""))}, ConfigError, "prompt 1 is empty"),
        (
            {"prompts": (Prompt("a", "x" * 250),)},
            ConfigError,
            "prompt 0 has 250 tokens: the model takes 256 tokens, 11 of them new",
        ),
        (
            {"held_out": (Prompt("a", "x" * 257),)},
            ConfigError,
            "held-out text 0 has 257 tokens: the model takes 256 tokens",
        ),
        ({"config": EPLBConfig(policy="fortune")}, ConfigError, "no policy 'fortune'"),
        ({"config": EPLBConfig(communicator="pigeon")}, ConfigError, "communicator 'pigeon'"),
        ({"model": Path("/nowhere")}, ModelError, "/nowhere: no such directory"),
    ],
)
def test_a_job_that_cannot_be_done_is_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[EquipoiseError], message: str
) -> None:
    with pytest.raises(error, match=message):
        run_alone(replace(make_spec(save_model(tmp_path), 1), **changes))


def test_redundant_experts_that_ranks_do_not_divide_are_refused(tmp_path: Path) -> None:
    config = EPLBConfig(num_redundant_experts=3)
    spec = replace(make_spec(save_model(tmp_path), 2), config=config)
    group = make_lone_group()
    group.size = 2
    with pytest.raises(PlacementError, match="11 slots, which 2 ranks do not divide"):
        run_job(spec, group, lambda record: None)


def test_a_wrong_token_is_found_with_its_margin() -> None:
    plain: Any = make_model("qwen3_moe")
    prompts = [(5, 6, 7), (8, 9)]
    on, off = {}, {}
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        whole = plain.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
        )[0]
        logits = plain(whole[None, :-1]).logits[0, len(prompt) - 1 :]
        generated = whole[len(prompt) :].tolist()
        on[number] = Request(str(number), prompt, generated=list(generated), logits=list(logits))
        off[number] = Request(str(number), prompt, generated=list(generated))
    group = make_lone_group()
    vocabulary = plain.config.vocab_size
    right = check_outputs(group, plain, prompts, off, on, vocabulary)
    assert right is not None
    assert right.outputs_identical
    assert right.max_logit_diff < 1e-5

    expected = off[1].generated[2]
    off[1].generated[2] = (expected + 1) % vocabulary
    wrong = check_outputs(group, plain, prompts, off, on, vocabulary)
    assert wrong is not None
    assert not wrong.outputs_identical
    assert wrong.num_tokens - wrong.num_identical == len(off[1].generated) - 2
    found = wrong.divergence
    assert found is not None
    assert (found.prompt, found.position, found.expected) == (1, 2, expected)
    assert found.got == off[1].generated[2]
    top = on[1].logits[2].topk(2).values
    assert found.margin == pytest.approx(float(top[0] - top[1]), abs=1e-4)

    on[0].logits[3] = on[0].logits[3] + 0.25
    shifted = check_outputs(group, plain, prompts, off, on, vocabulary)
    assert shifted is not None
    assert shifted.max_logit_diff == pytest.approx(0.25, abs=1e-4)


def test_loss_is_the_models_own() -> None:
    plain: Any = make_model("mixtral")
    tokens = tuple(range(2, 40))
    scores = score_plain(plain, [Text(1, tokens), Text(0, (3,)), Text(1, tokens[::-1])], 2)
    assert scores.num_tokens.tolist() == [0, 2 * 37]
    ids = torch.tensor([tokens, tokens[::-1]])
    assert scores.mean(1) == pytest.approx(float(plain(ids, labels=ids).loss), rel=1e-5)


def test_a_prompt_does_not_end_the_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_model(tmp_path))
    assert tokenizer("abc")["input_ids"][-1] == tokenizer.eos_token_id
    assert encode(tokenizer, "abc") == (100, 101, 102)
