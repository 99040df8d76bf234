"""What is said of a job: figures worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from equipoise.job.records import (
    CheckRecord,
    Divergence,
    LossRecord,
    Record,
    ResultRecord,
)
from equipoise.report.html import render_html
from equipoise.report.result import make_result, write_json
from equipoise.report.summary import write_sentence
from tests.report_job import (
    BALANCED,
    CHECK,
    INITIAL,
    ON,
    RESULT,
    STEP_1,
    STEP_2,
    STEP_3,
    Page,
    make_rebalance,
    make_step,
    sum_up,
)


def test_before_is_the_initial_placement_on_the_tokens_that_after_is_of() -> None:
    # Steps 2 and 3. Means 6 + 4 and 4 + 2; largest 8 + 4 and 6 + 4, then 6 + 4 and 6 + 4.
    assert make_result(sum_up())["balancedness"] == {
        "before": 16 / 22,
        "after": 16 / 20,
        "first_step": 2,
        "last_step": 3,
        "per_kind": {
            "prose": {"before": 10 / 12, "after": 1.0},
            "code": {"before": 6 / 10, "after": 6 / 10},
        },
        "per_layer": [
            {"before": 10 / 14, "after": 10 / 12},
            {"before": 6 / 8, "after": 6 / 8},
        ],
    }


def test_figures_are_of_the_same_steps() -> None:
    result = make_result(sum_up())
    assert result["expert_cpu_s"] == {
        "off": pytest.approx([0.2 + 0.3, 0.2]),
        "on": pytest.approx([0.2 + 0.3, 0.2]),
    }
    assert (result["new_tokens"], result["tokens_per_s"], result["steps"]) == (6, 3.0, 3)


def test_steps_of_mixed_text_count_for_all_and_for_no_kind() -> None:
    mixed = make_step("on", 4, None, STEP_2, BALANCED)
    balancedness = make_result(sum_up([*ON, mixed]))["balancedness"]
    assert balancedness["before"] == (16 + 10) / (22 + 12)
    assert balancedness["after"] == (16 + 10) / (20 + 10)
    assert list(balancedness["per_kind"]) == ["prose", "code"]
    assert balancedness["per_kind"]["prose"] == {"before": 10 / 12, "after": 1.0}


def test_without_a_rebalance_all_steps_are_covered() -> None:
    on = [make_step("on", n, "prose", c) for n, c in ((1, STEP_1), (2, STEP_2), (3, STEP_3))]
    for said in (on, [*on[:1], make_rebalance(1, INITIAL, moves=0), *on[1:]]):
        balancedness = make_result(sum_up(said))["balancedness"]
        # Means 5 + 5 too, and largest 8 + 5.
        assert balancedness["before"] == balancedness["after"] == (16 + 10) / (22 + 13)
        assert (balancedness["first_step"], balancedness["last_step"]) == (1, 3)


def test_a_plan_that_changes_nothing_does_not_begin_what_is_covered() -> None:
    later = [ON[0], make_rebalance(1, INITIAL, moves=0), make_step("on", 2, "prose", STEP_2)]
    last = make_step("on", 3, "code", STEP_3, BALANCED)
    summary = sum_up([*later, make_rebalance(2, BALANCED), last])
    assert summary.covered_steps == (3, 3)
    assert summary.covered.balancedness().before == 6 / 10


DIVERGED = CheckRecord(1200, 1100, 0.25, Divergence(7, 3, expected=65, got=66, margin=0.03125))

SENTENCES: dict[str, tuple[list[Record], CheckRecord | None, str]] = {
    "moved": (
        ON,
        CHECK,
        "The slowest rank did 1.4 times its share, now 1.2; 2 experts moved in 0.3 s; 12 of 12 "
        "tokens identical to the plain model.",
    ),
    "no plan": (
        [ON[0]],
        CHECK,
        "The slowest rank did 1.3 times its share; nothing was moved: no plan fell due in 1 step; "
        "12 of 12 tokens identical to the plain model.",
    ),
    "a plan for nothing": (
        [ON[0], make_rebalance(1, INITIAL, moves=0)],
        CHECK,
        "The slowest rank did 1.3 times its share; nothing was moved: 1 plan in 1 step changed "
        "nothing; 12 of 12 tokens identical to the plain model.",
    ),
    "moved at the end": (
        [ON[0], make_rebalance(1, BALANCED, moves=1)],
        CHECK,
        "The slowest rank did 1.3 times its share; 1 expert moved in 0.3 s, but no step ran after "
        "that; 12 of 12 tokens identical to the plain model.",
    ),
    "not checked": (
        [ON[0]],
        None,
        "The slowest rank did 1.3 times its share; nothing was moved: no plan fell due in 1 step; "
        "tokens were not compared with the plain model.",
    ),
    "diverged": (
        [ON[0]],
        DIVERGED,
        "The slowest rank did 1.3 times its share; nothing was moved: no plan fell due in 1 step; "
        "1,100 of 1,200 tokens identical to the plain model, the first difference at token 3 of "
        "prompt 7, where the plain model's choice led by 0.031 in its logits.",
    ),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_one_sentence_says_what_came_of_it(case: str) -> None:
    on, check, sentence = SENTENCES[case]
    assert write_sentence(sum_up(on, replace(RESULT, check=check))) == sentence


def test_the_json_has_what_was_promised() -> None:
    result = json.loads(write_json(sum_up()))
    expected = {
        "format_version": 1,
        "model": "/models/small",
        "device": "cpu",
        "dtype": "float32",
        "ranks": 2,
        "slots_per_rank": 2,
        "redundant_experts": 0,
        "policy": "deepseek",
        "communicator": "torch_gloo",
        "steps": 3,
        "prompts": 3,
        "new_tokens": 6,
        "tokens_per_s": 3.0,
        "seconds": {"off": 1.5, "on": 2.0},
        "outputs_identical": True,
        "max_logit_diff": 1.5e-6,
        "tokens_compared": 12,
        "tokens_identical": 12,
        "divergence": None,
        "losses": {
            "prose": {"num_tokens": 40, "off": 1.25, "on": 1.25, "plain": 1.25},
            "code": {"num_tokens": 30, "off": 0.5, "on": 0.5, "plain": 0.5},
        },
        "rebalances": [
            {
                "planned_step": 1,
                "step": 1,
                "moves": 2,
                "local_moves": 0,
                "bytes": 2000,
                "plan_s": 0.012,
                "transfer_s": 0.3,
                "forward_s": 0.01,
                "balancedness_before": 0.75,
                "balancedness_after": 1.0,
            }
        ],
    }
    assert {name: result[name] for name in expected} == expected
    assert result["summary"] == write_sentence(sum_up())
    assert set(result["versions"]) == {"python", "equipoise", "torch", "transformers", "numpy"}


def test_a_divergence_is_told_in_full() -> None:
    result = json.loads(write_json(sum_up(result=replace(RESULT, check=DIVERGED))))
    assert result["outputs_identical"] is False
    assert result["divergence"] == {
        "prompt": 7, "position": 3, "expected": 65, "got": 66, "margin": 0.03125,
    }  # fmt: skip


def test_what_was_not_measured_is_null_and_nothing_is_not_a_number() -> None:
    losses = (LossRecord("prose", 40, 1.25, 1.25, None),)
    summary = sum_up([], ResultRecord(None, losses, {"off": 0.0, "on": 0.0}, ()))
    text = write_json(summary)
    assert "NaN" not in text
    assert "Infinity" not in text
    result = json.loads(text)
    for name in ("outputs_identical", "max_logit_diff", "divergence", "tokens_per_s"):
        assert result[name] is None
    assert result["losses"]["prose"]["plain"] is None
    assert result["balancedness"] == {
        "before": 1.0, "after": 1.0, "first_step": None, "last_step": None, "per_kind": {},
        "per_layer": [{"before": 1.0, "after": 1.0}] * 2,
    }  # fmt: skip
    assert Page(render_html(summary)).text.count("No plan fell due.") == 1
