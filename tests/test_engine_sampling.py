"""Which token comes next."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from equipoise.engine.requests import Request, SamplingParams
from equipoise.engine.sampling import choose_tokens, draw_uniform
from equipoise.errors import ConfigError

LOGITS = torch.tensor([2.0, 0.5, 1.0, -1.0, 1.0, -30.0])


def make_request(position: int, seed: int = 3, temperature: float = 1.0, top_p: float = 1.0):
    sampling = SamplingParams(max_new_tokens=9, temperature=temperature, top_p=top_p, seed=seed)
    return Request("r", (1,), sampling, generated=[0] * position)


def draw_many(num: int, **sampling: float) -> np.ndarray:
    requests = [make_request(0, seed=seed, **sampling) for seed in range(num)]
    tokens = choose_tokens(LOGITS.expand(num, -1), requests).tolist()
    return np.bincount(tokens, minlength=len(LOGITS)) / num


def test_shares_are_those_of_the_softmax() -> None:
    """Twenty thousand draws: five standard deviations are below 0.02."""
    for temperature in (0.5, 1.0, 2.0):
        want = (LOGITS / temperature).softmax(0).numpy()
        assert np.abs(draw_many(20_000, temperature=temperature) - want).max() < 0.02


def test_top_p_leaves_the_likeliest_tokens_that_have_it_together() -> None:
    """Shares are 0.50, 0.11, 0.18, 0.02, 0.18: 0.6 takes the first of two equal ones."""
    share = LOGITS.softmax(0).numpy()
    got = draw_many(20_000, top_p=0.6)
    want = np.where([True, False, True, False, False, False], share, 0)
    assert np.abs(got - want / want.sum()).max() < 0.02
    assert (draw_many(50, top_p=1e-9) == [1, 0, 0, 0, 0, 0]).all()
    assert (draw_many(50, temperature=1e-4) == [1, 0, 0, 0, 0, 0]).all()


def test_a_token_depends_on_seed_and_position_alone() -> None:
    alone = [
        int(choose_tokens(LOGITS[None], [make_request(position, seed)])[0])
        for seed in range(4)
        for position in range(25)
    ]
    requests = [make_request(position, seed) for seed in range(4) for position in range(25)]
    greedy = [make_request(2, temperature=0.0)]
    together = choose_tokens(
        LOGITS.expand(101, -1), [*requests[:50], *greedy, *requests[50:]]
    ).tolist()
    assert together[:50] + together[51:] == alone
    assert together[50] == 0
    assert len(set(alone)) > 3


def test_numbers_are_even_and_apart() -> None:
    numbers = np.array([draw_uniform(s, i) for s in (0, 1, 2**64 - 1) for i in range(2_000)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.02
    assert len(set(numbers)) == len(numbers)
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.07


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must be a number from 0 on, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be a number from 0 on, got nan"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
        ({"seed": -1}, "seed must be from 0 to"),
        ({"seed": 1 << 64}, "seed must be from 0 to"),
        ({"stop": ("a", "")}, "a stop string must not be empty"),
    ],
)
def test_wrong_sampling_is_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**wrong)
