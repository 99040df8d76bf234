"""The only place that imports NIXL-EP, and what is known of its low-latency kernels (1.4.0)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import torch
from torch import Tensor

from equipoise.errors import CommunicatorUnavailable

HIDDEN_SIZES = (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)
"""Hidden sizes that the kernels were compiled for."""
MAX_TOP_K = 11
"""Most slots of a token."""
TOKEN_MULTIPLE = 4
"""Tokens per rank are a multiple of this, as rows are copied in bulk."""
NODE_RANKS = 8
"""A buffer is for fewer ranks than this, or for a multiple of it."""

_MODULES = ("nixl_ep_cu13", "nixl_ep_cu12", "nixl_ep")
_INSTALL = "pip install 'equipoise[nixl]' on Linux with CUDA, a build for this torch"


class MetadataStore(Protocol):
    """What a buffer exchanges its metadata through; a TCPStore is one."""

    def set(self, key: str, value: bytes) -> None:
        """Put."""

    def wait(self, keys: Sequence[str], timeout: timedelta) -> None:
        """Until all are there."""

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        """Get."""

    def delete_key(self, key: str) -> bool:
        """Take away."""


class Buffer(Protocol):
    """What is used of `nixl_ep.Buffer`."""

    def update_memory_buffers(
        self, num_ranks: int, num_experts_per_rank: int, num_rdma_bytes: int
    ) -> None:
        """Take the memory; once."""

    def set_tcp_store_group(self, tcp_store_group: Any) -> None:
        """Where metadata is exchanged from now on."""

    def connect_ranks(self, remote_ranks: list[int], activate: bool = True) -> None:
        """Connect; each of them must connect this rank too."""

    def disconnect_ranks(self, remote_ranks: list[int]) -> None:
        """Forget connected ranks."""

    def update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Leave a rank out, or take it in again."""

    def query_mask_buffer(self, mask_status: Tensor) -> None:
        """Write which ranks are left out, [ranks] int32."""

    def low_latency_dispatch(
        self, x: Tensor, topk_idx: Tensor, num_max_dispatch_tokens_per_rank: int, **options: Any
    ) -> tuple[Any, Tensor, Any, Any, Callable[[], None] | None]:
        """Send tokens."""

    def low_latency_combine(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: Any, **options: Any
    ) -> tuple[Tensor, Any, Callable[[], None] | None]:
        """Send outputs home."""

    def destroy(self) -> None:
        """Release everything; once."""


class Kernels(Protocol):
    """What makes buffers: NIXL-EP, or what stands for it where there is no GPU."""

    @property
    def index_dtype(self) -> torch.dtype:
        """Of slot ids."""

    @property
    def connects_beside_dispatch(self) -> bool:
        """Whether ranks may be connected, and left masked, while others' tokens travel."""

    def count_bytes(self, max_tokens: int, hidden_size: int, num_ranks: int, slots: int) -> int:
        """Device memory that a buffer of this shape needs, in bytes, but for a fixed workspace."""

    def open(self, rank: int, timeout: timedelta) -> Buffer:
        """Make a buffer without memory, that waits for a peer's tokens so long."""


@dataclass(frozen=True)
class NixlEPKernels:
    """NIXL-EP itself.

    Attributes:
        module: as imported.
    """

    module: Any

    @property
    def index_dtype(self) -> torch.dtype:
        """As the protocol says."""
        dtype: torch.dtype = self.module.topk_idx_t
        return dtype

    @property
    def connects_beside_dispatch(self) -> bool:
        """From 1.5.1 on, as it says; with 1.4.0 a rank that serves meanwhile ends by a fault."""
        try:
            release = version(self.module.__name__.replace("_ep_", "-")).split(".")[:3]
        except PackageNotFoundError:
            return False
        return [int(part) for part in release if part.isdecimal()] >= [1, 5, 1]

    def count_bytes(self, max_tokens: int, hidden_size: int, num_ranks: int, slots: int) -> int:
        """As the protocol says."""
        return int(
            self.module.Buffer.get_low_latency_buffer_size_hint(
                max_tokens, hidden_size, num_ranks, slots
            )
        )

    def open(self, rank: int, timeout: timedelta) -> Buffer:
        """As the protocol says."""
        buffer: Buffer = self.module.Buffer(
            explicitly_destroy=True,
            rank=rank,
            low_latency_mode=True,
            timeout_ms=max(1, round(timeout.total_seconds() * 1000)),
        )
        return buffer


def load_nixl_ep() -> NixlEPKernels:
    """Import NIXL-EP.

    Collective: none.
    Raises: CommunicatorUnavailable if there is no CUDA device, or no build for this torch.
    """
    if not torch.cuda.is_available():
        raise CommunicatorUnavailable("nixl_ep needs a CUDA device, and torch sees none here")
    failures = []
    for name in _MODULES:
        try:
            return NixlEPKernels(importlib.import_module(name))
        except (ImportError, OSError) as error:
            failures.append(f"{name}: {error}")
    raise CommunicatorUnavailable(
        f"nixl_ep cannot be imported ({'; '.join(failures)}): {_INSTALL}, {torch.__version__}"
    )
