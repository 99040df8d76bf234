"""Experts by grouped matmul give what the family's own forward gives, on both layouts."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from equipoise.comm.byte_views import view_widest
from equipoise.models import grouped
from equipoise.models.grouped import (
    compute_blocks,
    compute_rows,
    compute_sorted,
    computes_grouped,
)

FAMILIES = {
    # Gate and activation; biases, transposed weights, a gate of its own; no gate.
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeExperts", {"num_experts": 5}),
    "gpt_oss": ("GptOssConfig", "GptOssExperts", {"num_local_experts": 5}),
    "mixtral": ("MixtralConfig", "MixtralExperts", {"num_local_experts": 5}),
}
WIDTH, INNER, NUM_SLOTS = 32, 48, 5


def make_experts(family: str, dtype: torch.dtype) -> Any:
    config_name, class_name, options = FAMILIES[family]
    models = f"transformers.models.{family}"
    config = getattr(importlib.import_module(f"{models}.configuration_{family}"), config_name)(
        hidden_size=WIDTH, intermediate_size=INNER, moe_intermediate_size=INNER, **options
    )
    config._experts_implementation = "grouped_mm"
    experts = getattr(importlib.import_module(f"{models}.modeling_{family}"), class_name)(config)
    random = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random) / 4
    return experts.to(dtype)


def expect(experts: Any, hidden: Tensor, slots: Tensor) -> Tensor:
    ones = hidden.new_ones(len(slots), 1)
    output: Tensor = type(experts).forward(experts, hidden, slots[:, None], ones)
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_both_layouts_give_the_familys_own_outputs(family: str, dtype: torch.dtype) -> None:
    experts = make_experts(family, dtype)
    assert computes_grouped(experts)
    random = torch.Generator().manual_seed(1)
    for counts in ([3, 0, 7, 1, 2], [0, 0, 0, 0, 4], [8, 8, 8, 8, 8]):
        count = torch.tensor(counts)
        slots = torch.arange(NUM_SLOTS).repeat_interleave(count)
        hidden = torch.randn(len(slots), WIDTH, generator=random).to(dtype)
        expected = expect(experts, hidden, slots)
        ends = count.cumsum(0).int()
        torch.testing.assert_close(compute_sorted(experts, hidden, slots, ends), expected)

        blocks = torch.full((NUM_SLOTS, 8, WIDTH), float("nan")).to(dtype)
        is_row = torch.arange(8) < count[:, None]
        blocks[is_row] = hidden
        for max_rows in (len(slots), len(slots) + 5, 1000):
            got = compute_blocks(experts, blocks, count.int(), max_rows)
            assert got.shape == blocks.shape
            torch.testing.assert_close(got[is_row], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_as_they_came_give_the_familys_own_outputs_to_the_bit(
    family: str, dtype: torch.dtype
) -> None:
    experts = make_experts(family, dtype)
    random = torch.Generator().manual_seed(2)
    # Rows of their bytes alone are one stride apart, those that came with words behind them more.
    for num_rows, num_outputs, stride in ((9, 40, WIDTH), (9, 40, WIDTH + 16), (1, 1, WIDTH)):
        came = torch.randn(num_rows, stride, generator=random).to(dtype)[:, :WIDTH]
        row = torch.randint(num_rows, (num_outputs,), generator=random)
        slots = torch.randint(NUM_SLOTS, (num_outputs,), generator=random)
        got = compute_rows(experts, came, row, slots)
        assert torch.equal(got, expect(experts, came[row], slots))
    # As an expert's norm may leave them: wider than the weights.
    wide = came.double()
    assert compute_rows(experts, wide, row, slots).dtype == torch.float64


@torch.no_grad()
def test_no_rows_at_all_are_blocks_too() -> None:
    experts = make_experts("qwen3_moe", torch.float32)
    blocks = torch.full((NUM_SLOTS, 8, WIDTH), float("nan"))
    counts = torch.zeros(NUM_SLOTS, dtype=torch.int32)
    assert compute_blocks(experts, blocks, counts, 16).shape == blocks.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("width", [32, 12, 6, 5])
@torch.inference_mode()
def test_blocks_are_put_in_place_to_the_bit(
    dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the bytes are: NaNs keep what else they say."""
    random = torch.Generator().manual_seed(3)
    shape = (NUM_SLOTS, 8, width * dtype.itemsize)
    sent = torch.randint(256, shape, generator=random, dtype=torch.uint8)
    # The first bits of some numbers of any width are all ones.
    sent.view(torch.int16)[:, :, 3::4] |= -128
    blocks, count = sent.view(dtype), torch.tensor([3, 0, 8, 1, 2])
    assert blocks.isnan().any()
    monkeypatch.setattr(grouped, "compute_sorted", lambda _, hidden, *rest: hidden)
    got = compute_blocks(None, blocks, count, 20)
    is_row = torch.arange(8) < count[:, None]
    assert torch.equal(got.view(torch.uint8)[is_row], sent[is_row])


def test_rows_are_seen_in_the_widest_unit_that_divides_them() -> None:
    rows = torch.arange(160, dtype=torch.int16).view(4, 40)
    for one, unit in (
        (rows, torch.complex128),
        (rows[:, :36], torch.int64),
        (rows[:, 2:], torch.int32),
        (rows[:, :39], torch.int16),
        (rows[:, ::2], torch.int16),
        (rows.long(), torch.complex128),
        (rows.to(torch.complex128), torch.complex128),
    ):
        seen, _ = view_widest(one, one.new_empty(9, one.shape[1]))
        assert seen.dtype == unit
        assert torch.equal(seen.clone().view(one.dtype), one)
    # Both have to allow it.
    assert (
        view_widest(rows[:, :8], torch.empty(9, 20, dtype=rows.dtype)[:, :8])[0].element_size() == 8
    )


def test_another_implementation_is_left_alone() -> None:
    experts = make_experts("qwen3_moe", torch.float32)
    experts.config._experts_implementation = "eager"
    assert not computes_grouped(experts)
    assert not computes_grouped(torch.nn.Linear(1, 1))


def test_quantised_experts_are_left_alone() -> None:
    experts = make_experts("qwen3_moe", torch.float32)
    experts.down_proj.requires_grad_(False).data = experts.down_proj.to(torch.float8_e4m3fn)
    assert not computes_grouped(experts)
