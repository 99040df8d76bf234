"""Every family that can be taken over, on four ranks, against the plain model; the others named."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise.errors import ModelError
from equipoise.models.contract import REASONS, find_expert_layers
from tests.models.comparison import REBALANCES, compare
from tests.models.thread_ranks import ThreadRanks
from tests.models.tiny import Family, list_families, list_outside, make_skeleton

COMMON = frozenset(
    {
        "DeepseekV3Experts",
        "Ernie4_5_MoeExperts",
        "Glm4MoeExperts",
        "GptOssExperts",
        "GraniteMoeExperts",
        "Llama4TextExperts",
        "MiniMaxM2Experts",
        "MixtralExperts",
        "OlmoeExperts",
        "PhimoeExperts",
        "Qwen2MoeExperts",
        "Qwen3MoeExperts",
        "Qwen3VLMoeTextExperts",
    }
)
"""Tested always; the others where EQUIPOISE_ALL_FAMILIES is set."""

TOLERANCE = 2e-6
TABLE = Path(__file__).parents[2] / "docs" / "models.md"


def choose_families() -> list[Any]:
    everything = bool(os.environ.get("EQUIPOISE_ALL_FAMILIES"))
    return [
        pytest.param(
            family,
            id=family.experts,
            marks=() if family.experts in COMMON else pytest.mark.slow,
        )
        for family in list_families()
        if everything or family.experts in COMMON
    ]


@pytest.fixture(scope="module")
def ranks() -> Iterator[ThreadRanks]:
    torch.set_num_threads(1)
    started = ThreadRanks(4)
    yield started
    started.close()


@pytest.mark.parametrize("family", choose_families())
def test_logits_are_those_of_the_plain_model(family: Family, ranks: ThreadRanks) -> None:
    """With batched_mm every bit counts.

    Other kernels sum in an order that depends on which tokens meet at a rank. For the same reason
    the plain model's logits differ between its own kernels, and families with a norm behind a small
    sum amplify it; ours may be away from them by twice that.
    """
    steps = list(compare(family, ranks))
    assert len(steps) == REBALANCES + 1
    assert sum(step.moves for step in steps) > 0
    assert max(step.most_replicas for step in steps) > 1
    for step in steps:
        for difference in step.differences:
            if difference.kernels == "batched_mm":
                assert difference.identical
            else:
                assert difference.largest <= max(TOLERANCE, 2 * difference.own), difference


@pytest.mark.parametrize("family", list_outside(), ids=lambda family: family.experts)
def test_what_is_outside_the_contract_is_refused_by_name(family: Family) -> None:
    reason = REASONS.get(family.experts, "is not decorated with")
    with pytest.raises(ModelError, match=f"{family.experts} cannot be taken over: ") as raised:
        find_expert_layers(make_skeleton(family))
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)


def test_every_family_is_in_the_table() -> None:
    """A new release of transformers with a family that nobody has run yet is found here."""
    text = TABLE.read_text(encoding="utf-8")
    unknown = [
        family.experts
        for family in (*list_families(), *list_outside())
        if f"`{family.experts}`" not in text
    ]
    assert not unknown, f"run `python -m tests.models.table`: docs/models.md lacks {unknown}"
