"""Which token comes next.

Axis letters: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from equipoise.engine.requests import Request


@torch.inference_mode()
def choose_tokens(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Choose the next token of each request, as its sampling asks.

    Args:
        logits: [B, V] float32, behind each request's last token.
        requests: B of them.
    Returns:
        [B] int64, on the host once the device was waited for. Collective: none; drawing waits.
    """
    tokens = logits.argmax(dim=-1)
    drawn = [row for row, request in enumerate(requests) if request.sampling.temperature > 0]
    if drawn:
        row_D = torch.tensor(drawn, device=logits.device)  # noqa: N806 - D drawn rows
        tokens[row_D] = _draw(logits[row_D], [requests[row] for row in drawn])
    return tokens.to("cpu", non_blocking=True)


def _draw(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """[B] int64. In double precision: shares of a large vocabulary are small.

    Tokens are laid out by number and not by rank, so that where two are nearly as likely, the last
    bits of their logits, which depend on the batch, move no other token's share.
    """
    settings = [
        (r.sampling.temperature, r.sampling.top_p, draw_uniform(r.sampling.seed, len(r.generated)))
        for r in requests
    ]
    columns = torch.tensor(settings, dtype=torch.float64, device=logits.device)
    temperature, top_p, uniform = columns.T[..., None]
    # From the largest down, and by no less than what divides at all: however small a temperature,
    # the likeliest token keeps its share, and none becomes infinity less infinity.
    behind = logits.double() - logits.amax(dim=-1, keepdim=True)
    share = (behind / temperature.clamp(min=torch.finfo(torch.float64).tiny)).softmax(dim=-1)
    ordered, token = share.sort(dim=-1, descending=True, stable=True)
    beyond = ordered.cumsum(dim=-1) - ordered >= top_p
    # The likeliest always stays, whatever rounding says.
    beyond[:, 0] = False
    share = share.masked_fill(torch.zeros_like(beyond).scatter(1, token, beyond), 0.0)
    laid_out = share.cumsum(dim=-1)
    total = laid_out[:, -1:]
    # Below the total even where the product is rounded up to it: the token found has a share.
    point = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(laid_out, point, right=True)[:, 0]


def draw_uniform(seed: int, position: int) -> float:
    """A number from 0 to below 1 that depends on both alone.

    Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011), Philox4x64.
    """
    generator = np.random.Generator(np.random.Philox(key=seed, counter=position << 64))
    return float(generator.random())
