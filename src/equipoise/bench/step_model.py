"""A model of the bundled one's architecture whose tokens go where a real trace's went.

Axis letters: L layers, E experts, T tokens, K experts per token, S slots of a rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from equipoise.bench.step_case import ModelSize
from equipoise.bench.step_parts import mark, measure
from equipoise.dispatch.base import Dispatched, DispatchedBlocks, DispatchedRows
from equipoise.models.experts import compute_dispatched
from equipoise.models.parallel import ParallelModel
from equipoise.topology import IntArray

_POOL = 4096
"""Tokens whose routes are drawn; they come round and round, from another one on in each call."""
_ROUNDS = 10
_NUM_AHEAD = 3


def build_model(size: ModelSize, dtype: torch.dtype, device: torch.device, seed: int) -> Any:
    """A whole model with random weights, the same on every rank.

    Collective: none.
    """
    transformers: Any = import_module("transformers")
    config = transformers.Qwen3MoeConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden_size,
        intermediate_size=size.expert_size,
        moe_intermediate_size=size.expert_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        head_dim=size.head_dim,
        num_experts=size.num_experts,
        num_experts_per_tok=size.top_k,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        norm_topk_prob=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    return model.eval().requires_grad_(False)


class Routes:
    """Sends tokens to experts by given shares, in place of what the router says.

    Weights stay the router's. Owner: the forward thread.

    Args:
        parallel: a model with one set of layers.
        shares: [L, E], how often each expert is to be chosen, relative to the others.
        seed: of what is drawn.
    """

    def __init__(self, parallel: ParallelModel, shares: IntArray, top_k: int, seed: int) -> None:
        self._device = parallel.state.group.device
        self._shares, self._top_k = shares, top_k
        self._random = torch.Generator(self._device).manual_seed(seed)
        (one,) = parallel.spread.sets
        self._pools = [self._draw(row) for row in range(len(one.layers))]
        self._at = 0
        for row, layer in enumerate(one.layers):
            layer.module.forward = self._redirect(row, layer.module.forward)

    def rename_experts(self) -> None:
        """Have other experts be the busy ones from now on; waits for the device."""
        order = torch.randperm(self._shares.shape[1], generator=self._random, device=self._device)
        for pool in self._pools:
            pool.copy_(order[pool])
        if self._device.type == "cuda":
            # It is no part of the step that comes.
            torch.cuda.synchronize(self._device)

    def _draw(self, row: int) -> Tensor:
        """[T, K] int64: K different experts per token, each as often as its share says.

        Source: Madow, On the theory of systematic sampling II (1949), with experts laid out in
        another order for each token.
        """
        share = torch.tensor(self._shares[row], dtype=torch.float64, device=self._device)
        # Nothing is chosen more than once per token: what is above goes to the others.
        often = share / share.sum() * self._top_k
        for _ in range(8):
            often = often.clamp(max=1.0) * (self._top_k / often.clamp(max=1.0).sum())
        often = often.clamp(max=1.0)
        size = (_POOL, share.numel())
        order = torch.rand(size, generator=self._random, device=self._device).argsort(dim=1)
        laid_out = often[order].cumsum(dim=1)
        laid_out *= self._top_k / laid_out[:, -1:]
        first = torch.rand(_POOL, 1, generator=self._random, device=self._device).double()
        points = first + torch.arange(self._top_k, device=self._device)
        place = torch.searchsorted(laid_out, points, right=True).clamp_(max=size[1] - 1)
        return order.gather(1, place)

    def _redirect(self, row: int, inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
        pool = self._pools[row]

        def forward(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            # Another part of the pool in each layer and call.
            self._at = (self._at + 997) % _POOL
            tokens = torch.arange(self._at, self._at + top_k_index.shape[0], device=self._device)
            return inner(hidden, pool[tokens % _POOL].to(top_k_index.dtype), top_k_weights)

        return forward


@dataclass(frozen=True)
class _Blocks(DispatchedBlocks):
    """Blocks of noise, of which as much is rows as a load says.

    Attributes:
        noise: [S, C, D].
        count: [S] int32.
        most: that all counts together can be.
    """

    noise: Tensor
    count: Tensor
    most: int

    @property
    def hidden_SCD(self) -> Tensor:  # noqa: N802 - as its contract says
        return self.noise

    @property
    def count_S(self) -> Tensor:  # noqa: N802 - as its contract says
        return self.count

    @property
    def max_rows(self) -> int:
        return self.most

    @property
    def hidden_ND(self) -> Tensor:  # noqa: N802 - as its contract says
        return self.noise[self._is_row]

    @property
    def slot_N(self) -> Tensor:  # noqa: N802 - as its contract says
        return self._is_row.nonzero()[:, 0]

    @property
    def _is_row(self) -> Tensor:
        place = torch.arange(self.noise.shape[1], device=self.count.device)
        return place < self.count[:, None]


def measure_experts(parallel: ParallelModel, slot_count: Tensor) -> Tensor:
    """Time a layer's experts with given loads.

    As layers compute what came, be it rows or blocks. Each load once a round, so that what drifts
    meets all alike.

    Args:
        parallel: the model, of one set of layers.
        slot_count: [n, S] int64, rows that came to the slots of a rank, n times; as kernels take
            rows in tiles, their time also depends on how slots share them.
    Returns:
        [n] float64, median seconds.
    Collective: none; other ranks should be at the same thing, or at rest.
    """
    (one,) = parallel.spread.sets
    module: Any = one.layers[0].module
    top_k: int = parallel.model.config.num_experts_per_tok
    device = parallel.state.group.device
    make = _make_blocks if one.dispatcher.captures else _make_rows
    came = make(parallel, slot_count, next(module.parameters()).dtype)
    rounds = []
    with torch.inference_mode():
        for _ in range(1 + _ROUNDS):
            marks = []
            # At first the host is behind, and a device would be timed that waits for it.
            for dispatched in came[:_NUM_AHEAD]:
                compute_dispatched(module, dispatched, top_k)
            for dispatched in came:
                before = mark(device)
                compute_dispatched(module, dispatched, top_k)
                marks.append((before, mark(device)))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            rounds.append([measure(*pair) for pair in marks])
    # The first round is for whatever happens once.
    return torch.tensor(rounds[1:], dtype=torch.float64).quantile(0.5, dim=0)


def _make_blocks(
    parallel: ParallelModel, slot_count: Tensor, dtype: torch.dtype
) -> list[Dispatched]:
    """As dispatchers that a graph captures leave what came: no host knows how many rows that is."""
    (dispatcher,), group = parallel.dispatchers, parallel.state.group
    assert dispatcher.max_tokens is not None, "blocks have room for so many"
    config = parallel.model.config
    num_slots, capacity = slot_count.shape[1], group.size * dispatcher.max_tokens
    # Gigabytes, so that all loads share them.
    shape = num_slots, capacity, config.hidden_size
    noise = torch.randn(shape, dtype=dtype, device=group.device)
    most = capacity * min(num_slots, config.num_experts_per_tok)
    return [_Blocks(noise, count, most) for count in slot_count.int().to(group.device)]


def _make_rows(parallel: ParallelModel, slot_count: Tensor, dtype: torch.dtype) -> list[Dispatched]:
    """Of tokens that all have as many slots on this rank."""
    group, config = parallel.state.group, parallel.model.config
    # Rows that come are read several times, and from caches.
    each = max(1, config.num_experts_per_tok // group.size)
    most = int(slot_count.sum(1).max())
    hidden = torch.randn(most, config.hidden_size, dtype=dtype, device=group.device)
    row = torch.arange(most, device=group.device) // each
    slots = [_mix(count).to(group.device) for count in slot_count]
    return [DispatchedRows(hidden, row[: len(slot)], slot, None) for slot in slots]


def _mix(count: Tensor) -> Tensor:
    """[rows] int64: which slot each row is for, in no order."""
    slot = torch.arange(len(count)).repeat_interleave(count)
    return slot[torch.randperm(len(slot))]
