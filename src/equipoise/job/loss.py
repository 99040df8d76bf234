"""Held-out loss by kind of text, in lockstep and in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equipoise.comm.groups import RankGroup
from equipoise.models.experts import ExpertParallelModel


@dataclass(frozen=True)
class Text:
    """A text to be scored.

    Attributes:
        kind: index of its kind.
        tokens: with fewer than two there is nothing to score.
    """

    kind: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Scores:
    """Sums over texts.

    Attributes:
        nats: [kinds] float64, sum of the losses of tokens.
        num_tokens: [kinds] float64, tokens scored.
    """

    nats: Tensor
    num_tokens: Tensor

    def mean(self, kind: int) -> float:
        """Nats per token of one kind; not a number where nothing was scored."""
        return float(self.nats[kind] / self.num_tokens[kind])


def score_in_lockstep(
    group: RankGroup, spread: ExpertParallelModel, texts: Sequence[Text], num_kinds: int
) -> Scores:
    """Score texts on all ranks; text i on rank i mod R.

    Ranks with fewer texts run dummy tokens, so that all take part in every exchange. The load of
    these passes is not kept.

    Args:
        group: the ranks.
        spread: the model.
        texts: the same on every rank.
        num_kinds: kinds that they are of.
    Returns:
        Sums over all ranks, the same on each.
    Collective: every rank of the group.
    Raises: TransferError or MembershipError within the deadline if a rank does not take part.
    """
    device = spread.maps.slot_to_expert.device
    mine = [text for text in texts[group.rank :: group.size] if len(text.tokens) > 1]
    nobody = torch.zeros(1, dtype=torch.bool, device=device)

    def forward(token_ids: Tensor) -> Tensor:
        with spread.route(None, group.rank) as model:
            return _logits(model, token_ids)

    most = torch.tensor([len(mine)])
    group.all_reduce(most, "max")
    scores = _score(forward, mine, num_kinds, device)
    for _ in range(int(most) - len(mine)):
        with torch.inference_mode(), spread.route(nobody, 0) as model:
            _logits(model, torch.zeros(1, 1, dtype=torch.int64, device=device))
    spread.recorder.clear()
    for sums in (scores.nats, scores.num_tokens):
        group.all_reduce(sums, "sum")
    return scores


def score_plain(plain: Any, texts: Sequence[Text], num_kinds: int) -> Scores:
    """Score texts with a plain model in this process. Collective: none."""
    return _score(lambda token_ids: _logits(plain, token_ids), texts, num_kinds, plain.device)


def _logits(model: Any, token_ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=token_ids, use_cache=False).logits
    return logits


def _score(
    forward: Callable[[Tensor], Tensor],
    texts: Sequence[Text],
    num_kinds: int,
    device: torch.device,
) -> Scores:
    nats = torch.zeros(num_kinds, dtype=torch.float64)
    num_tokens = torch.zeros(num_kinds, dtype=torch.float64)
    with torch.inference_mode():
        for text in texts:
            if len(text.tokens) < 2:
                continue
            token_ids = torch.tensor([text.tokens], device=device)
            logits = forward(token_ids)[0, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits, token_ids[0, 1:], reduction="none")
            nats[text.kind] += losses.double().sum().cpu()
            num_tokens[text.kind] += losses.numel()
    return Scores(nats, num_tokens)
