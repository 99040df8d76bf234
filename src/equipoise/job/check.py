"""Our tokens against those of the plain model, in one process.

Axis letters: G generated tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equipoise.comm.groups import RankGroup
from equipoise.engine.requests import Request
from equipoise.job.records import CheckRecord, Divergence


@dataclass(frozen=True)
class _Served:
    """One prompt as it was served.

    Attributes:
        prompt: its index.
        off: tokens of the pass without balancing.
        on: tokens of the pass with it.
        logits: [G, V] float32, of the tokens in `on`.
    """

    prompt: int
    off: list[int]
    on: list[int]
    logits: Tensor


def check_outputs(
    group: RankGroup,
    plain: Any | None,
    prompts: Sequence[Sequence[int]],
    off: dict[int, Request],
    on: dict[int, Request],
    vocabulary_size: int,
) -> CheckRecord | None:
    """Compare the tokens of both passes with the plain model's greedy ones, prompt by prompt.

    The plain model sees each prompt with our tokens behind it. Where its best token is ours at
    every position, its own greedy decoding would have gone the same way.

    Args:
        group: the ranks; prompt i is on rank i mod R.
        plain: the plain model, on rank 0.
        prompts: tokens of all prompts.
        off: this rank's requests of the pass without balancing, by prompt.
        on: those of the pass with it; they have kept their logits.
        vocabulary_size: V.
    Returns:
        The comparison on rank 0, None elsewhere.
    Collective: every rank; others than 0 send one prompt at a time, in the order of prompts.
    Raises: MembershipError within the deadline if a rank does not take part.
    """
    if group.rank != 0:
        for prompt, request in on.items():
            _send(group, _pack(prompt, off[prompt], request, vocabulary_size))
        return None
    num_tokens = num_identical = 0
    max_logit_diff, divergence = 0.0, None
    for served in _gather(group, len(prompts), off, on, vocabulary_size):
        tokens = prompts[served.prompt]
        same, different, diff = _compare(plain, served.prompt, tokens, served.on, served.logits)
        same_off, different_off = same, different
        if served.off != served.on:
            same_off, different_off, _ = _compare(plain, served.prompt, tokens, served.off, None)
        num_tokens += len(served.on) + len(served.off)
        num_identical += same + same_off
        max_logit_diff = max(max_logit_diff, diff)
        divergence = divergence or different or different_off
    return CheckRecord(num_tokens, num_identical, max_logit_diff, divergence)


def _gather(
    group: RankGroup,
    num_prompts: int,
    off: dict[int, Request],
    on: dict[int, Request],
    vocabulary_size: int,
) -> Iterator[_Served]:
    for prompt in range(num_prompts):
        owner = prompt % group.size
        if owner == 0:
            yield _pack(prompt, off[prompt], on[prompt], vocabulary_size)
        else:
            yield _receive(group, owner, prompt, vocabulary_size)


def _pack(prompt: int, off: Request, on: Request, vocabulary_size: int) -> _Served:
    logits = torch.stack(on.logits) if on.logits else torch.zeros(0, vocabulary_size)
    return _Served(prompt, off.generated, on.generated, logits)


def _send(group: RankGroup, served: _Served) -> None:
    group.send(torch.tensor([len(served.off), len(served.on)]), 0)
    if served.off or served.on:
        group.send(torch.tensor([*served.off, *served.on]), 0)
    if served.on:
        group.send(served.logits, 0)


def _receive(group: RankGroup, owner: int, prompt: int, vocabulary_size: int) -> _Served:
    sizes = torch.zeros(2, dtype=torch.int64)
    group.recv(sizes, owner)
    num_off, num_on = sizes.tolist()
    tokens = torch.zeros(num_off + num_on, dtype=torch.int64)
    logits = torch.zeros(num_on, vocabulary_size)
    if num_off or num_on:
        group.recv(tokens, owner)
    if num_on:
        group.recv(logits, owner)
    off, on = tokens[:num_off].tolist(), tokens[num_off:].tolist()
    return _Served(prompt, off, on, logits)


def _compare(
    plain: Any,
    prompt: int,
    tokens: Sequence[int],
    generated: Sequence[int],
    logits: Tensor | None,
) -> tuple[int, Divergence | None, float]:
    """Tokens that are equal, the first that is not, and the largest difference of logits so far.

    Logits count up to and with the first difference: until there both saw the same tokens.
    """
    if not generated:
        return 0, None, 0.0
    with torch.inference_mode():
        sequence = torch.tensor([[*tokens, *generated[:-1]]], device=plain.device)
        output = plain(input_ids=sequence, use_cache=False, logits_to_keep=len(generated))
    expected = output.logits[0].float().cpu()
    best = expected.topk(2, dim=-1)
    got = torch.tensor(list(generated))
    wrong = (best.indices[:, 0] != got).nonzero()
    same = int(wrong[0]) if wrong.numel() else len(generated)
    seen = slice(0, same + 1)
    diff = 0.0 if logits is None else float((logits[seen] - expected[seen]).abs().max())
    if same == len(generated):
        return same, None, diff
    margin = float(best.values[same, 0] - best.values[same, 1])
    different = Divergence(prompt, same, int(best.indices[same, 0]), int(got[same]), margin)
    return same, different, diff
