"""Llama 4 as other families are: its experts are called with tokens, experts and weights.

transformers gives each expert of a Llama 4 block every token, times its router's score, which is 0
for all but the chosen ones. Here a chosen expert is given its token alone; one that was given zeros
would have added zeros. Layers are called in place, weights stay theirs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import Tensor, nn

BLOCK, EXPERTS = "Llama4TextMoe", "Llama4TextExperts"


@dataclass
class _Config:
    """What decides which kernels compute; transformers lets nobody choose them for Llama 4."""

    _experts_implementation: str = "grouped_mm"


def adapt_llama4(model: nn.Module) -> None:
    """Bring the MoE blocks of a Llama 4 model into transformers' contract, in place.

    Args:
        model: of any family, on any device; what is no such block stays as it is. Twice is fine.
    Collective: none.
    """
    for block in list(model.modules()):
        experts: Any = getattr(block, "experts", None)
        if type(block).__name__ == BLOCK and type(experts).__name__ == EXPERTS:
            experts.__class__ = _make_class()
            experts.config = _Config()
            experts.has_gate, experts.has_bias, experts.has_post_expert_norm = True, False, False
            experts.is_transposed, experts.is_concatenated = True, True
            experts._is_expert_parallel = False
            block.forward = _make_forward(block)


@functools.cache
def _make_class() -> type[nn.Module]:
    """The class of experts, called with what it is to compute."""
    moe: Any = import_module("transformers.integrations.moe")
    family: Any = import_module("transformers.models.llama4.modeling_llama4")

    def forward(self: Any, hidden_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        raise NotImplementedError(f"{EXPERTS} compute by transformers' kernels")

    made = type(EXPERTS, (family.Llama4TextExperts,), {"forward": forward})
    decorated: type[nn.Module] = moe.use_experts_implementation(
        made, is_transposed=True, is_concatenated=True
    )
    return decorated


def _make_forward(block: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        hidden_TD = hidden_states.reshape(-1, block.hidden_dim)
        score_TE, router_logits = block.router(hidden_TD)
        score_TK, expert_TK = score_TE.topk(block.top_k, dim=1)
        output_TD: Tensor = block.shared_expert(hidden_TD)
        for k in range(block.top_k):
            score_T1, expert_T1 = score_TK[:, k : k + 1], expert_TK[:, k : k + 1]
            # The score is a factor of what goes in, not of what comes out.
            one_T1 = score_T1.new_ones(score_T1.shape)
            output_TD.add_(block.experts(hidden_TD * score_T1, expert_T1, one_T1))
        return output_TD, router_logits

    return forward
